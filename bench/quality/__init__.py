"""What a selection keeps on a real server: needles, agreement, recall, tasks; and the small model that shows it."""

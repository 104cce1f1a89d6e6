"""Words that needles are made of: names, none of them in the built-in prose, and values."""

NAMES = (
    *("amber", "basil", "cedar", "delta", "ember", "fjord", "gecko", "hazel", "indigo", "jasper", "koala", "lotus"),
    *("maple", "nylon", "otter", "panda", "quartz", "raven", "saffron", "tulip", "umbra", "violet", "walnut", "xenon"),
    *("yucca", "zebra", "acorn", "badger", "cactus", "dolphin", "eagle", "falcon", "ginger", "heron", "iris", "jackal"),
    *("kiwi", "lemon", "mango", "nectar", "olive", "pepper", "quince", "rabbit", "salmon", "tiger", "urchin"),
    *("vanilla", "willow", "yarrow"),
)
VALUES = (
    *("anchor", "bridge", "candle", "dagger", "engine", "feather", "goblet", "hammer", "island", "jacket", "ladle"),
    *("ladder", "mirror", "needle", "orchard", "pillow", "quiver", "ribbon", "saddle", "tunnel", "vessel", "wagon"),
    *("anvil", "barrel", "carpet", "drum", "easel", "flute", "guitar", "helmet", "igloo", "jigsaw", "kayak", "magnet"),
    *("marble", "notebook", "oboe", "pencil", "quilt", "rocket", "shovel", "trumpet", "uniform", "trombone"),
    *("whistle", "zipper", "banner", "compass", "desk", "elevator"),
)

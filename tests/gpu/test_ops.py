"""The public operations on a GPU: kernels agree with their reference twins."""

import op_cases
import pytest


@pytest.mark.parametrize("case", op_cases.CASES, ids=lambda case: case.__name__)
def test_kernels_and_reference_agree(case) -> None:
    op_cases.assert_agree(case, "cuda")

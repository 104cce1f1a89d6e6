"""Layout of SGLang's index-K pool, limits of the kernels, and routers: the one place for them. Imports no package.

A page is one uint8 row of PAGE_BYTES: PAGE keys of HEAD_DIM fp8 e4m3, then their PAGE fp32 scales.
"""

from typing import Literal, get_args

PAGE = 64  # tokens
HEAD_DIM = 128  # of an index head; bytes of a key
PAGE_BYTES = PAGE * (HEAD_DIM + 4)

ROUTED_PAGES = 256  # of a decode row over sketches, whose means its heads are routed by: at most so many, evenly spaced
SKETCH_BITS = (1, 2)  # of each coordinate of a key's difference to its page's mean
SKETCH_STEP = 0.9957  # σ between the four uniform levels that fit a Gaussian best

SPREAD = 1 / 6  # of a head's mean product with blocks, which its products with keys are taken to deviate at least
TILT = 1.755  # deviations above the mean at which a residual is made: there is the best tenth of a Gaussian
INDEX_HEADS = (32, 64)  # H of GLM-5 and DeepSeek-V3.2
Router = Literal["mean", "peak", "signed", "weight", "error"]  # in the order of heads.cuh's enumeration
ROUTERS: tuple[Router, ...] = get_args(Router)
ROUTED_HEADS = (4, 8, 16, 32, 64)  # h that the prefill scorer is built for
MAX_CANDIDATES = 16384  # C: a row's re-ranking runs in one thread block's shared memory
MAX_KEPT_PREFILL = 49152  # tokens of (blocks + 1) · block_size, and k / 2, that one row's top k holds in prefill
MAX_KEPT_DECODE = 32768  # the same in decode, without k / 2: scores of a row that one thread block holds in registers


def sketch_bytes(bits: int) -> int:
    """Bytes of a page's sketch: codes of `bits` a coordinate in 32-bit words, then a bf16 scale a key.

    The words lie as m16n8k32 tensor-core products read them: lane 4·r + c of a warp holds dimensions 32·c … 32·c + 31
    of keys 16·g + 2·r and 16·g + 2·r + 1, g = 0 … 3. With e, w < 4, u < 2, word [n / (8 / bits), u, lane, w] holds
    dimensions 32·c + 16·u + 4·w + e of the keys n = 2·g + key % 2, from bit 8·e + bits · (n % (8 / bits)) on: so one
    mask takes a key's codes of four dimensions. Scales are ordered [r, g, key % 2].
    """
    return PAGE * (HEAD_DIM * bits // 8 + 2)


def statistics_bytes(bits: int | None) -> int:
    """Bytes of a page's statistics in a layer: its mean in bf16, and a sketch of `bits` where there is one."""
    return 2 * HEAD_DIM + (0 if bits is None else sketch_bytes(bits))


def sketch_bits(width: int) -> Literal[1, 2]:
    """Bits a coordinate of sketches of `width` bytes a page. Raises ValueError where none are so wide."""
    for bits in (1, 2):
        if width == sketch_bytes(bits):
            return bits
    widths = " or ".join(str(sketch_bytes(bits)) for bits in SKETCH_BITS)
    raise ValueError(f"sketches: expected uint8 [P, {widths}], got {width} bytes a page; allocate sketch_bytes(bits)")

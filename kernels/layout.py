"""Layout of SGLang's index-K pool and the limits of the kernels: the one place for both. Imports nothing.

A page is one uint8 row of PAGE_BYTES: PAGE keys of HEAD_DIM fp8 e4m3, then their PAGE fp32 scales.
"""

PAGE = 64  # tokens
HEAD_DIM = 128  # of an index head; bytes of a key
PAGE_BYTES = PAGE * (HEAD_DIM + 4)

INDEX_HEADS = (32, 64)  # H of GLM-5 and DeepSeek-V3.2
ROUTED_HEADS = (4, 8, 16, 32, 64)  # h that the prefill scorer is built for
MAX_CANDIDATES = 16384  # C: a row's re-ranking runs in one thread block's shared memory
MAX_KEPT_PREFILL = 49152  # tokens of (blocks + 1) · block_size, and k / 2, that one row's top k holds in prefill
MAX_KEPT_DECODE = 32768  # the same in decode, without k / 2

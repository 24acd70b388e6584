"""All implementations side by side: the seed's shapes, videos, Wan, lengths, batches, heads."""

from benchmarks.suites.suite import side_by_side
from rcmlib.measure.benchmark import PEERS

# (B, H, N, D) by case name
QUICK = {"N1024": (4, 12, 1024, 64), "D128_N4096": (1, 16, 4096, 128)}
SEED = {f"N{n}": (4, 12, n, 64) for n in (1024, 2048, 4096, 8192)}
# Wan's 480p latents: 30 × 52 patches a latent frame, which is one or four frames of video.
VIDEO = {f"frames{f}": (1, 12, f * 30 * 52, 64) for f in (1, 5, 9, 13, 21)}
# Wan 2.1 1.3B (12 heads) and 14B (40), 81 frames of 480p and of 720p.
WAN = {f"H{h}_N{n}": (1, h, n, 128) for h in (12, 40) for n in (32760, 75600)}
SCALING = {f"N{n}": (1, 12, n, 64) for n in (2**e for e in range(8, 18))}
BATCH = {f"B{b}": (b, 12, 2048, 64) for b in (2**e for e in range(7))}
DIMS = {f"D{d}": (4, 16, 4096, d) for d in (64, 96, 128)}

FEW = ("flash_compiled", "cudnn_compiled", "fa4_compiled", "fused", "sage")
STRONG = (
    "flash_compiled", "cudnn_compiled", "fa4_compiled", "flex_compiled", "triton_skip", "fused",
)  # fmt: skip
EIGHT_BIT = ("sage", "sage_kernel_fp8", "sage1_compiled")
# It compiles slowly.
WITHOUT_FLEX = tuple(label for label in PEERS if label != "flex_compiled")
# A call takes up to a third of a second, and the five samples that fit into a second are too
# few for an interval.
WAN_SAMPLES = 40

CHECKED = (
    "Three query rows of each checked against float64 first: `errors` is their relative L2, "
    "below 0.01, or 0.06 in 8 bits. peak_bytes: the most memory that one call holds above its "
    "inputs. failed: what was not timed, and why. sage_kernel_fp8 gets 8-bit copies made "
    "before; sage makes them in its time."
)


SUITES = {
    "quick": side_by_side("Two shapes, in half a minute.", CHECKED, QUICK, FEW),
    "seed": side_by_side(
        "Every implementation at B = 4, 12 heads of 64, from 1024 to 8192 tokens.",
        CHECKED,
        SEED,
        PEERS,
    ),
    "video": side_by_side(
        "Videos of 1 to 21 latent frames of 30 × 52 tokens (81 frames of 480p are 21), "
        "12 heads of 64.",
        CHECKED,
        VIDEO,
        WITHOUT_FLEX,
    ),
    "wan": side_by_side(
        "Wan's self-attention: 12 heads (1.3B) and 40 heads (14B) of 128, 81 frames of 480p "
        "(32760 tokens) and of 720p (75600).",
        CHECKED,
        WAN,
        (*STRONG, *EIGHT_BIT),
        least=WAN_SAMPLES,
    ),
    "scaling": side_by_side(
        "One sequence from 256 to 131072 tokens, 12 heads of 64: time and peak memory.",
        CHECKED,
        SCALING,
        ("naive", *FEW, "sage_kernel_fp8"),
    ),
    "batch": side_by_side(
        "From 1 to 64 sequences of 2048 tokens, 12 heads of 64.",
        CHECKED,
        BATCH,
        ("naive", *FEW),
    ),
    "dims": side_by_side(
        "Head dimensions 64, 96 and 128: B = 4, 16 heads, 4096 tokens.",
        CHECKED,
        DIMS,
        (*STRONG, *EIGHT_BIT),
    ),
}

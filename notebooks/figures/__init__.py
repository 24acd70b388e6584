"""The book's figures: one function a figure, one module a chapter; each returns a Figure."""

from notebooks.figures.baseline import (
    ledger_boxes,
    noise_levels,
    photo_to_tokens,
    skip_share,
)
from notebooks.figures.coefficients import (
    cancellation,
    coefficients_over_time,
    one_ray,
    three_places,
)
from notebooks.figures.epilogue import (
    against_cudnn,
    dataflow,
    headline,
    one_over_n,
    seed_times,
)
from notebooks.figures.fp8 import (
    dropped_bits,
    e4m3_grid,
    error_budget,
    long_sum,
    weight_range,
)
from notebooks.figures.fusing import launches, saved_bytes, skip_cost
from notebooks.figures.gradients import (
    loss_curves,
    lost_delta,
    training_ratios,
    two_walks,
)
from notebooks.figures.int8 import (
    copy_share,
    granularity_errors,
    outlier_channels,
    shared_scales,
)
from notebooks.figures.limits import layer_times, my_gpu, roofline, who_wins
from notebooks.figures.projection import (
    birth_of_a_tile,
    block_times,
    projection_gain,
    wan_block_places,
)
from notebooks.figures.sage import (
    sage_crossover,
    sage_speeds,
    taking_turns,
    who_holds_what,
)
from notebooks.figures.skip import copy_ceiling, programs_1d, programs_3d
from notebooks.figures.speed import (
    batches_and_heads,
    one_sample,
    samples_in_turn,
    scaling,
    speed_rows,
    speeds_by_length,
    where_the_speed_is_from,
)
from notebooks.figures.style import PALETTE, new_figure
from notebooks.figures.tiles import (
    attention_rates,
    rescaling,
    score_memory,
    tiles_in_flight,
)
from notebooks.figures.traffic import (
    byte_boxes,
    cache_size,
    predicted_and_counted,
    where_counters_sit,
)

__all__ = [
    "PALETTE",
    "against_cudnn",
    "attention_rates",
    "batches_and_heads",
    "birth_of_a_tile",
    "block_times",
    "byte_boxes",
    "cache_size",
    "cancellation",
    "coefficients_over_time",
    "copy_ceiling",
    "copy_share",
    "dataflow",
    "dropped_bits",
    "e4m3_grid",
    "error_budget",
    "granularity_errors",
    "headline",
    "launches",
    "layer_times",
    "ledger_boxes",
    "long_sum",
    "loss_curves",
    "lost_delta",
    "my_gpu",
    "new_figure",
    "noise_levels",
    "one_over_n",
    "one_ray",
    "one_sample",
    "outlier_channels",
    "photo_to_tokens",
    "predicted_and_counted",
    "programs_1d",
    "programs_3d",
    "projection_gain",
    "rescaling",
    "roofline",
    "sage_crossover",
    "sage_speeds",
    "samples_in_turn",
    "saved_bytes",
    "scaling",
    "score_memory",
    "seed_times",
    "shared_scales",
    "skip_cost",
    "skip_share",
    "speed_rows",
    "speeds_by_length",
    "taking_turns",
    "three_places",
    "tiles_in_flight",
    "training_ratios",
    "two_walks",
    "wan_block_places",
    "weight_range",
    "where_counters_sit",
    "where_the_speed_is_from",
    "who_holds_what",
    "who_wins",
]

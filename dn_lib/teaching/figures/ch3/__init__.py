"""Chapter 3: one Householder matrix, two tokens by hand, paths of influence, and what rounding does to each method.

Every function returns the figure that it drew.  What is drawn is computed here by `dn_lib`, never typed in.
"""

from dn_lib.teaching.figures.ch3.common import (
    DELTA,
    METHODS,
    NAMES,
    SOFT,
    correlated_keys,
    paths,
    weight,
)
from dn_lib.teaching.figures.ch3.drawings import (
    draw_squeezed_plane,
    draw_squeezed_strip,
    every_path,
    images_of_a_vector,
    letter_f,
    merge_of_paths,
    path_diagram,
    two_reflections,
    two_tokens,
    wy_product,
)
from dn_lib.teaching.figures.ch3.numbers import (
    COSINES,
    SAFE,
    STRENGTHS,
    errors_against_cosine,
    errors_against_length,
    largest_numbers,
    merged_t,
    multiplications,
    numbers_on_the_way,
    rounding_error,
    safety_table,
    three_key_sets,
    worst_error,
)

__all__ = [
    "COSINES",
    "DELTA",
    "METHODS",
    "NAMES",
    "SAFE",
    "SOFT",
    "STRENGTHS",
    "correlated_keys",
    "draw_squeezed_plane",
    "draw_squeezed_strip",
    "errors_against_cosine",
    "errors_against_length",
    "every_path",
    "images_of_a_vector",
    "largest_numbers",
    "letter_f",
    "merge_of_paths",
    "merged_t",
    "multiplications",
    "numbers_on_the_way",
    "path_diagram",
    "paths",
    "rounding_error",
    "safety_table",
    "three_key_sets",
    "two_reflections",
    "two_tokens",
    "weight",
    "worst_error",
    "wy_product",
]

# SPDX-License-Identifier: Apache-2.0
"""Rows of a trainer's own pass, found again by what it was given."""

import pytest
import torch

from endotrl.scoring.reference_pass import _is_given


@pytest.mark.parametrize(("types", "is_given"), [([0, 0, 0], True), ([0, 1, 0], False), ([0, 0], False)], ids=str)
def test_token_types_of_a_row_without_images(types, is_given):
    given = {"token_type_ids": torch.tensor([types])}
    assert _is_given(None, given, {}, 0, torch.ones(3, dtype=torch.bool)) is is_given

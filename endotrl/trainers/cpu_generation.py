# SPDX-License-Identifier: Apache-2.0
"""Fast generation on a CPU."""

from transformers import PreTrainedModel


def make_head_input_contiguous(model: PreTrainedModel) -> None:
    """
    Makes a model's LM head take its input contiguous. `generate` gives the head a slice of the hidden states, and
    PyTorch multiplies a non-contiguous batch with a matrix by copying the matrix for every row, which for 64 rows and
    49,152 words takes longer on a CPU than all other work of the prompt's forward pass.
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0].contiguous(),))

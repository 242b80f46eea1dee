# SPDX-License-Identifier: Apache-2.0
"""Demo: two language models that improve by their own reward, without labels, a hub or a GPU."""

from .demo import run_demo


__all__ = ["run_demo"]

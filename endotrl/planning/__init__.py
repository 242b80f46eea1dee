# SPDX-License-Identifier: Apache-2.0
"""Whether a recipe fits on given hardware, from configs alone."""

# SPDX-License-Identifier: Apache-2.0
"""Memory and time planning: whether a recipe fits on given hardware, from configs alone."""

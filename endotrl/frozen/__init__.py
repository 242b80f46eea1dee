# SPDX-License-Identifier: Apache-2.0
"""The frozen model: names, own copies, loaded models, and weights shared with a trainer."""

# SPDX-License-Identifier: Apache-2.0
"""Forecast of the outcome of RL on a frozen model's reward, from samples of the frozen model."""

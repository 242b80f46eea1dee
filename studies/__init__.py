# SPDX-License-Identifier: Apache-2.0
"""Research: theory on exact token MDPs, and studies of whole runs. Not in the wheel."""

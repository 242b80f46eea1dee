# SPDX-License-Identifier: Apache-2.0
"""Command line: every option parser of the package."""

# SPDX-License-Identifier: Apache-2.0
"""The command line: every option parser of the package."""

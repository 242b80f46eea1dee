# SPDX-License-Identifier: Apache-2.0
"""What endotrl costs (`make bench`) and what it gains, each against a named rival in the same run."""

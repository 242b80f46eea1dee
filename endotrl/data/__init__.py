# SPDX-License-Identifier: Apache-2.0
"""Dataset reading for all commands: rows of files, hub datasets or standard input, in TRL's dataset formats."""

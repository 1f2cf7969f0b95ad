"""Failing cases: made smaller, written to a file, run again, and described in a bug report."""

# SPDX-License-Identifier: Apache-2.0

"""The report of a comparison: its data, and what shows it on a terminal and as an HTML page."""

# SPDX-License-Identifier: Apache-2.0

"""The report of a comparison, on a terminal and as an HTML page.

`parts.py` lists the parts of a comparison; each of them is a section of the report. `data.py` holds the
report, `terminal.py` prints it, and `html.py` writes the page.
"""

# SPDX-License-Identifier: Apache-2.0

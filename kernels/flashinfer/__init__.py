"""FlashInfer's functions that we call, each described once. No module outside this folder imports it.

`version` says what is installed and which versions are described, `rules` what a backend refuses and
why, `function` a function's arguments and what each receives. An adapter is such a description and a
table of rules; `table` lists all functions. A new version of FlashInfer is a range of versions beside
an argument or a rule.
"""

# SPDX-License-Identifier: Apache-2.0

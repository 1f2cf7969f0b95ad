"""The functions of FlashInfer that we call, each described once. Only this folder imports FlashInfer.

`version` has the installed version and those that are described. `rules` has the type of a reason to
refuse a call. `description` has the type of a function: its arguments, and the value of each. An adapter
is such a description and a table of rules; `functions` lists all descriptions. A new version of
FlashInfer is a range of versions beside an argument or a rule.
"""

# SPDX-License-Identifier: Apache-2.0

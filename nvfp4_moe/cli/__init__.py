"""The subcommands of `nvfp4-moe`: arguments to a call, its result to an exit status."""

# SPDX-License-Identifier: Apache-2.0

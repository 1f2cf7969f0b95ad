"""Output for people: tables and progress, by rich on a terminal, plain text everywhere else."""

# SPDX-License-Identifier: Apache-2.0

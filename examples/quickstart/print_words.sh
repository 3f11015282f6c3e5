#!/usr/bin/env bash
# Stands in for the interpreter of a recipe to learn what the recipe would run.
printf '%s\0' "$@"

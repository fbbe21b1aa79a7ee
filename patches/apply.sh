#!/usr/bin/env bash
# Apply the patch that fits a Megatron-LM tree, or take it out again: the whole of it or nothing.
set -euo pipefail

usage="apply.sh [--check | --reverse] /path/to/Megatron-LM"

fail() {
    echo "apply.sh: error: $*" >&2
    exit 2
}

action=apply
case ${1:-} in
--check | --reverse)
    action=${1#--}
    shift
    ;;
esac
[ $# -eq 1 ] || fail "$# folders are given; use $usage"
command -v git >/dev/null || fail "git is not installed; it applies the patches"
tree=$(cd "$1" 2>/dev/null && pwd -P) || fail "'$1' is no folder; use $usage"
for file in megatron/core/package_info.py megatron/training/arguments.py; do
    [ -f "$tree/$file" ] || fail "'$1' has no $file; use a Megatron-LM checkout"
done

version=$(sed -n 's/^\(MAJOR\|MINOR\) = \([0-9]*\).*/\2/p' "$tree/megatron/core/package_info.py" | paste -sd.)
case $version in
0.17) name=core_v0.17.1 ;;
0.18) name=core_v0.18.2 ;;
0.19) name=core_v0.19.0 ;;
0.20) name=main ;;
*) fail "'$1' is Megatron-Core $version; allowed: 0.17, 0.18, 0.19, 0.20 (main)" ;;
esac
patch=$(cd "$(dirname "$0")" && pwd -P)/megatron-lm/$name.patch

# Inside another repository, git would take the patch's paths from that one's root and silently do nothing.
unset GIT_DIR GIT_WORK_TREE
export GIT_CEILING_DIRECTORIES=${tree%/*}
apply() { git -C "$tree" apply "$@" "$patch"; }

if apply --reverse --check 2>/dev/null; then
    state=applied
elif apply --check 2>/dev/null; then
    state=absent
else
    fail "$name.patch does not fit '$1', whose megatron/training/arguments.py differs; nothing was changed"
fi

case $action,$state in
apply,applied) echo "apply.sh: $name.patch is already applied to $1" ;;
apply,absent) apply && echo "apply.sh: $name.patch is applied to $1" ;;
reverse,applied) apply --reverse && echo "apply.sh: $name.patch is taken out of $1" ;;
reverse,absent) echo "apply.sh: $name.patch is not applied to $1" ;;
check,applied) echo "apply.sh: $name.patch is applied to $1" ;;
check,absent) echo "apply.sh: $name.patch fits $1 and is not applied" ;;
esac

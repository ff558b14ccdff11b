#!/bin/sh
# Runs nvcc and does not let the assembler's complaints pass:  run_nvcc.sh {warn,error} nvcc ... -o object
#
# ptxas reports what ruins a kernel in ways that nvcc's own -Werror misses: wgmma instructions run one
# after the other ("(C7510) Potential Performance Loss") are mere information to it. Here every line
# counts, for without -v ptxas is silent unless something is worth a look: with "error" the object is
# removed and the compilation has failed; with "warn" a line at the end points to them.
mode=$1
shift
output=$("$@" 2>&1)
status=$?
[ -z "$output" ] || printf '%s\n' "$output"
[ $status -eq 0 ] || exit $status

complaints=$(printf '%s\n' "$output" | grep -c -E '^ptxas (warning|info) *:')
[ "$complaints" -ne 0 ] || exit 0
echo "memeff: $complaints complaints of ptxas, see above"
[ "$mode" = error ] || exit 0
while [ "$1" != -o ]; do shift; done
rm -f "$2"
exit 1

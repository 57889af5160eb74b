#!/bin/bash
# verify.sh [NAME-PATTERN]: verifies the cases of cases.txt whose names match (all by default) and compares with what is
# expected. verify.sh -t NAME: the counterexample of a case, readable. Needs spin and gcc (apt-get install spin gcc).
# MEM: megabytes a case may take; T: seconds. Work files go to build/.
cd "$(dirname "$0")" || exit 2
command -v spin > /dev/null && command -v gcc > /dev/null || { echo "verify.sh: spin and gcc are needed: apt-get install spin gcc"; exit 2; }
if [ "$1" = -t ]; then
  cd "build/$2" && ./pan -r -m2000000 m.pml.trail 2>&1 | grep -E "^ *T |pan:|CYCLE" | sed -e 's:^ *T ::' \
    -e 's:frame5(.*) from:hello from:;s:frame4:data:;s:frame3:have:;s:frame2:closed:;s:frame1(.*) from:at from:'
  exit
fi
# The rules that the code follows.
rules="-DFIXAT=1 -DLINGER=1 -DFIXJUMP=1 -DLAG=2 -DFIXLIFE=1 -DFIXSHA=1 -DNOALONE=1 -DFIXHOP=1 -DFIXNO=1 -DLATE=1 -DPAT=3"
wrong=0
while read -r name expected storage defs <&3; do
  [[ $name =~ ${1:-.} ]] && [[ $name != \#* ]] && [ -n "$name" ] || continue
  case $storage in
    exact) flags="-DCOLLAPSE -DSAFETY -DNOREDUCE" pan="" ;;
    compact) flags="-DHC4 -DSAFETY -DNOREDUCE" pan="" ;;      # 8 bytes a state: a missed one is very unlikely
    shortest) flags="-DBFS -DCOLLAPSE -DSAFETY -DNOREDUCE" pan="" defs="$defs -DNOHID" ;;
    cycles) flags="-DCOLLAPSE -DNP -DNOREDUCE" pan="-l" ;;    # no cycle without progress
    fair) flags="-DNOREDUCE -DNFAIR=4" pan="-a -f" ;;         # weak fairness, for dup.pml
  esac
  file=mesh.pml; [ "$storage" = fair ] && file=dup.pml
  mkdir -p "build/$name"; cp $file "build/$name/m.pml"
  ( cd "build/$name" && rm -f ./*.trail && spin -a ${defs//RULES/$rules} m.pml > gen.log 2>&1 \
    && gcc -O2 -w -DMEMLIM=${MEM:-8000} -DVECTORSZ=4096 $flags -o pan pan.c 2> gcc.log \
    && timeout ${T:-600} ./pan -m2000000 $pan > pan.log 2>&1; echo "rc $?" >> pan.log )
  log=build/$name/pan.log
  if grep -q "errors: 0$" "$log" && ! grep -qE "max search depth too small|out of memory|rc [^0]" "$log"; then found=verified
  elif grep -qE "errors: [1-9]" "$log" && [ -f "build/$name/m.pml.trail" ]; then found=counterexample
  else found=unfinished; fi
  note=ok; [ $found = "$expected" ] || { note="NOT AS EXPECTED ($expected)"; wrong=1; }
  states=$(grep -iE "states, stored" "$log" | head -1 | awk '{print $1}'); seconds=$(grep -E "elapsed time" "$log" | awk '{print $4}')
  printf '%-22s %-15s %10s states %7s s  %s\n' "$name" $found "${states:--}" "${seconds:--}" "$note"
done 3< cases.txt
exit $wrong

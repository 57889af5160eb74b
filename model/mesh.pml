/* The exchange protocol of the mesh (src/decaf_lora/engines/mesh/), agent by agent, edge by edge.  See README.md.
   One transition = one atomic step of one agent (receive a frame, open, close, jump, leave, notice a break) or of
   the environment (break, reconnect, crash, restart).  Time is not modelled: patience is a choice (PAT). */
#ifndef N
#define N 2          /* agents */
#endif
#ifndef R
#define R 3          /* exchanges */
#endif
#ifndef B
#define B 1          /* at most so many breaks of a connection */
#endif
#ifndef K
#define K 0          /* at most so many crashes (each followed by a restart) */
#endif
#ifndef KMIN
#define KMIN 0       /* an agent crashes only after it has closed so many */
#endif
#ifndef PAT
#define PAT 2        /* patience: 0 never, 1 only if the link is down or the peer has not opened e, 2 at any time, 3 only if the link is down or the data are not here (rule 4 of the proposal) */
#endif
#ifndef LINE
#define LINE 0       /* N=3: 1 line 0-1-2, 0 triangle */
#endif
#ifndef SCHED
#define SCHED 0      /* 1: a schedule over the line: edge 0-1 in odd exchanges, edge 1-2 in even ones */
#endif
#ifndef G
#define G 1          /* exchanges (hops) a round */
#endif
#ifndef CATCH
#define CATCH 3      /* catch_up if so far behind */
#endif
#ifndef LATE
#define LATE 0       /* 1: who is so far behind with an open exchange leaves it and catches up */
#endif
#ifndef GONE
#define GONE 3       /* misses after which an end forgets by itself */
#endif
#ifndef LAG
#define LAG 1        /* 1: a checkpoint may be one exchange behind what was announced; 0: never; 2: 1, but not for the last one */
#endif
#ifndef LINGER
#define LINGER 0     /* 0: done agents wait for next>R from all; 1: or for a neighbour that has left for good (time-out) */
#endif
#ifndef FIXLIFE
#define FIXLIFE 0    /* 1: a hello with a new life drops what is here of the old one */
#endif
#ifndef FIXSHA
#define FIXSHA 0     /* 1: have(e, sha) names the message that it acknowledges */
#endif
#ifndef FIXAT
#define FIXAT 0      /* 1: `at` goes out on every connection on which the own hello did, also before the other's hello is here */
#endif
#ifndef FIXJUMP
#define FIXJUMP 0    /* 1: who opens e counts everything below e as closed (and says next = e) */
#endif
#ifndef FIXNO
#define FIXNO 0      /* 1: a `closed` of my message undoes an earlier `have` of it */
#endif
#ifndef FIXBUF
#define FIXBUF 0     /* 1: "newest" is the last to arrive, not the highest number */
#endif
#ifndef NOALONE
#define NOALONE 0    /* 1: who can use nobody and sees nobody ahead waits, also while neighbours are up */
#endif
#ifndef FIXHOP
#define FIXHOP 0     /* 1: jumps lead to the first exchange of a round only, with a first-hop message */
#endif
#ifndef CMP
#define CMP 0        /* records are compared 0: at closing, sent one against received one; 1: on receipt of data */
#endif
#ifndef RESUME
#define RESUME 0     /* 0: a restart comes with (0,0) and no account; 1: with those of the checkpoint unless it catches up */
#endif
#ifndef REC
#define REC 0        /* 0: record = (epoch, uses); 1: record = uses only (no epoch); 2: record = digest of the account (exact here: R<=3, lives<=3) */
#endif
#ifndef OLD
#define OLD 0        /* 1: frames of a superseded connection may still be handled after the new one is up */
#endif
#ifndef CAP
#define CAP 16
#endif
/* what is asserted */
#ifndef A_ALL
#define A_ALL 0      /* every edge used in every exchange */
#endif
#ifndef A_SIDED
#define A_SIDED 0    /* 1: never one-sided; 2: only if the other end gave up by patience with the data in hand; 3: and its link was down */
#endif
#ifndef A_ACC
#define A_ACC 0      /* 2: equal records never hide differing accounts; 1: and after a use by both the accounts and records agree */
#endif
#ifndef A_CONT
#define A_CONT 0     /* 1: both used => each used the message that the other mixed with */
#endif
#ifndef A_BACK
#define A_BACK 0     /* 1: nobody closes alone while a neighbour is up and there was no patience */
#endif

#ifndef REACH
#define REACH 0      /* n: show that case n happens at all (the assertion must fail); see README */
#endif
#define probe(n) assert(REACH!=n)
#define X(i,vj) ((i)*N+(vj))
#define A(i,vj) (((i)<(vj)) -> X(i,vj) : X(vj,i))
#if SCHED
#define ROW(i,vj,ve) (NB(i,vj) && ((ve)+((i)+(vj))/2)%2==1)
#else
#define ROW(i,vj,ve) NB(i,vj)
#endif
/* j has closed an exchange from e on that it shares with i */
#define LEADS(i,vj,ve) (nx[X(i,vj)]>(ve) && (ROW(i,vj,ve) || nx[X(i,vj)]>(ve)+1))
#define XE(i,vj,ve) (X(i,vj)*R+(ve)-1)
#if LINE
#define NB(i,vj) ((i)+1==(vj) || (vj)+1==(i))
#else
#define NB(i,vj) ((i)!=(vj))
#endif
#if REC==2
#define RT int
#else
#define RT byte
#endif
#define CT4(c) (((c)>>3)*4+((c)&7))
#define EP(vr) ((vr)>>4)
#define US(vr) ((vr)&15)
#define HOP(ve) (((ve)-1)%G)
#define FIRST(ve) ((HOP(ve)==0) -> (ve) : ((((ve)-1)/G)+1)*G+1)
#define USED(u) ((u)>0 && (u)<200)
#define RUN 0
#define CRASHED 1
#define DONE 2
#define LEFT 3

mtype = {hello, data, have, closed, at};
chan q[N*N] = [CAP] of {mtype, byte, byte, byte, RT};   /* type, e, next, content, record */
#if OLD
chan oq[N*N] = [CAP] of {mtype, byte, byte, byte, RT};
#endif

byte st[N]; byte cl[N]; byte op[N]; byte oc[N]; byte life[N]; bit rs[N];
byte alive[N*N];            /* of an edge: 1 up, 0 broken, 2 closed by one that has left */
byte up[N*N];               /* as i sees j: 0 down, 1 connected, 2 said hello */
byte nx[N*N]; byte pl[N*N];
byte Oc[N*N]; RT Or[N*N]; byte We[N*N]; byte Wc[N*N]; RT Wr[N*N];
bit hv[N*N]; byte cd[N*N]; byte ms[N*N]; RT rec[N*N];
byte UC[N*N*R];             /* content of j that i used in e; 253 decided no, 254 patience without data, 255 patience with data, 252 the same and link down */
short F[N*N*R];             /* the account: which pair of messages was added in e */
byte MC[N*R];               /* the own message with which i closed e */
#if RESUME
RT krec[N*N]; short KF[N*N*R]; byte kcl[N]; RT prec[N*N]; short PF[N*N*R]; byte KU[N*N*R]; byte PU[N*N*R];
#endif
byte nb = 0; byte nk = 0; byte nleft = 0;
#if A_BACK
bit lonely = 0;
#endif
#ifdef NOHID
#define hidden     /* breadth-first search refuses hidden variables */
#endif
/* scratch, hidden from the state; every step sets what it reads */
hidden byte vj, vk, ve, vc, vn, ahead, tgt, va, vb; hidden byte back, any; hidden RT vr; hidden mtype vt;

#define snd(i,vj,vt,ve,vc,vr) if :: alive[A(i,vj)]==1 -> assert(nfull(q[X(i,vj)])); q[X(i,vj)]!vt,ve,cl[i]+1,vc,vr :: else -> printf("T      (%d sends into a dead connection to %d)\n",i,vj) fi

#define usable(i,vj) (Oc[X(i,vj)]!=0 && hv[X(i,vj)] && !(FIXNO && cd[X(i,vj)]>=op[i]))
#define decided(i,vj) (cd[X(i,vj)]>=op[i] || (nx[X(i,vj)]>op[i] && Oc[X(i,vj)]==0))
#if PAT==0
#define expire(i,vj) false
#elif PAT==1
#define expire(i,vj) (alive[A(i,vj)]!=1 || up[X(i,vj)]!=2 || (Oc[X(i,vj)]==0 && op[vj]!=op[i]))
#elif PAT==3
#define expire(i,vj) (alive[A(i,vj)]!=1 || up[X(i,vj)]!=2 || Oc[X(i,vj)]==0)
#else
#define expire(i,vj) true
#endif
#define through(i,vj) (!ROW(i,vj,op[i]) || usable(i,vj) || decided(i,vj) || expire(i,vj))
#define nofire(i,vj) (!ROW(i,vj,op[i]) || usable(i,vj) || decided(i,vj))
#define isup(i,vj) (NB(i,vj) && up[X(i,vj)]==2)
#define over(i,vj) (isup(i,vj) && LEADS(i,vj,op[i]))
#define inrow(i,vj) ROW(i,vj,op[i])
#define other(i,vj) (isup(i,vj) && !ROW(i,vj,op[i]) && nx[X(i,vj)]>=op[i])
#define bye(i,vj) (!NB(i,vj) || nx[X(i,vj)]>R || (LINGER==1 && st[vj]==LEFT && up[X(i,vj)]==0))
#if N==2
#define ALL(f,i) (f(i,0) && f(i,1))
#define ANY(f,i) (f(i,0) || f(i,1))
#define nbuse(i,vj) (ROW(i,vj,op[i]) && usable(i,vj))
#else
#define ALL(f,i) (f(i,0) && f(i,1) && f(i,2))
#define ANY(f,i) (f(i,0) || f(i,1) || f(i,2))
#define nbuse(i,vj) (ROW(i,vj,op[i]) && usable(i,vj))
#endif

inline zeroF(i,vj) { vk = 1; do :: vk<=R -> F[XE(i,vj,vk)] = 0; vk++ :: else -> break od }
inline forget(i,vj,mx) { zeroF(i,vj); rec[X(i,vj)] = (REC!=0 -> 0 : (((mx)+1)<<4)) }
inline setopen(i,ee,m) {
  op[i] = ee; oc[i] = life[i]*8+(m); printf("T %d opens %d with message made for %d (life %d)\n",i,op[i],oc[i]&7,life[i]);
#if FIXJUMP
  if :: cl[i]!=op[i]-1 -> cl[i] = op[i]-1;
        for (vj : 0 .. N-1) { if :: NB(i,vj) && (up[X(i,vj)]==2 || (FIXAT && up[X(i,vj)]==1)) -> snd(i,vj,at,0,0,0) :: else fi }
     :: else fi;
#endif
  for (vj : 0 .. N-1) { if :: NB(i,vj) ->
      Oc[X(i,vj)] = 0; Or[X(i,vj)] = 0; hv[X(i,vj)] = 0;
      if :: We[X(i,vj)]==op[i] -> Oc[X(i,vj)] = Wc[X(i,vj)]; Or[X(i,vj)] = Wr[X(i,vj)] :: else fi;
      if :: We[X(i,vj)]<=op[i] -> We[X(i,vj)] = 0; Wc[X(i,vj)] = 0; Wr[X(i,vj)] = 0 :: else fi;
      if :: up[X(i,vj)]==2 && ROW(i,vj,op[i]) -> snd(i,vj,data,op[i],oc[i],rec[X(i,vj)]) :: else fi
    :: else fi }
}
inline passed(i) {      /* i has closed or skipped everything up to cl[i] */
  op[i] = 0; oc[i] = 0;
  for (vj : 0 .. N-1) { if :: NB(i,vj) -> Oc[X(i,vj)] = 0; Or[X(i,vj)] = 0; hv[X(i,vj)] = 0;
      if :: We[X(i,vj)]<=cl[i] -> We[X(i,vj)] = 0; Wc[X(i,vj)] = 0; Wr[X(i,vj)] = 0 :: else fi;
      if :: up[X(i,vj)]==2 || (FIXAT && up[X(i,vj)]==1) -> snd(i,vj,at,0,0,0) :: else fi
    :: else fi };
#if A_ACC
  for (vj : 0 .. N-1) { if :: NB(i,vj) && cl[vj]==cl[i] && st[vj]!=CRASHED && rec[X(i,vj)]==rec[X(vj,i)] ->
      for (vk : 1 .. R) { assert(F[XE(i,vj,vk)]==F[XE(vj,i,vk)]) }    /* equal records never hide differing accounts */
    :: else fi };
#endif
  if :: cl[i]>=R -> st[i] = DONE :: else fi
}
inline catchup(i) {
  probe(1);
#if FIXHOP
  ahead = FIRST(ahead);
#endif
  cl[i] = ahead-1; printf("T %d catches up: closed through %d, records (0,0)\n",i,ahead-1);
  for (vj : 0 .. N-1) { if :: NB(i,vj) -> rec[X(i,vj)] = 0; zeroF(i,vj); ms[X(i,vj)] = 0 :: else fi };
  passed(i)
}
inline lookahead(i) {
  ahead = 0; back = 0; any = 0;
  for (vj : 0 .. N-1) { if :: isup(i,vj) -> any = 1;
      if :: nx[X(i,vj)]>ahead && LEADS(i,vj,vn) -> ahead = nx[X(i,vj)] :: else fi;
      if :: nx[X(i,vj)]<=vn -> back = 1 :: else fi
    :: else fi }
}
inline closeit(i) {
  ve = op[i];
  for (vj : 0 .. N-1) { if :: ROW(i,vj,ve) ->
      if :: usable(i,vj) ->
#if G>1
           assert(HOP(Oc[X(i,vj)]&7)==HOP(ve));   /* (5) the message was made for this hop */
#endif
           UC[XE(i,vj,ve)] = Oc[X(i,vj)]; ms[X(i,vj)] = 0; printf("T %d closes %d: USES %d (message of life %d, made for %d; records own (%d,%d) theirs (%d,%d))\n",i,ve,vj,Oc[X(i,vj)]>>3,Oc[X(i,vj)]&7,EP(rec[X(i,vj)]),US(rec[X(i,vj)]),EP(Or[X(i,vj)]),US(Or[X(i,vj)]));
#if CMP==0
           if :: Or[X(i,vj)]!=rec[X(i,vj)] ->
                probe(4); va = EP(Or[X(i,vj)]); vb = EP(rec[X(i,vj)]); va = (va>vb -> va : vb); forget(i,vj,va) :: else fi;
#endif
#if REC==2
           rec[X(i,vj)] = rec[X(i,vj)] | ((i<vj -> CT4(oc[i])*16+CT4(Oc[X(i,vj)]) : CT4(Oc[X(i,vj)])*16+CT4(oc[i])) << (8*(ve-1)));
#else
           rec[X(i,vj)]++;
#endif
           F[XE(i,vj,ve)] = (i<vj -> (oc[i]*64+Oc[X(i,vj)]) : (Oc[X(i,vj)]*64+oc[i]))
      :: else ->
           UC[XE(i,vj,ve)] = (decided(i,vj) -> 253 : (Oc[X(i,vj)]==0 -> 254 : (alive[A(i,vj)]==1 && up[X(i,vj)]==2 -> 255 : 252)));
           printf("T %d closes %d: WITHOUT %d (253 decided, 254 patience, 255 patience with the data here, 252 the same and link down: %d)\n",i,ve,vj,UC[XE(i,vj,ve)]);
           if :: ms[X(i,vj)]<4 -> ms[X(i,vj)]++ :: else fi;
           if :: ms[X(i,vj)]==GONE -> probe(5); vb = EP(rec[X(i,vj)]); forget(i,vj,vb); printf("T %d forgets edge to %d after misses\n",i,vj) :: else fi
      fi
    :: else fi };
#if G>1
  assert(HOP(oc[i]&7)==HOP(ve));
#endif
  MC[i*R+ve-1] = oc[i]; cl[i] = ve;
#if RESUME
  for (vj : 0 .. N-1) { prec[X(i,vj)] = krec[X(i,vj)]; krec[X(i,vj)] = rec[X(i,vj)];
    for (vk : 1 .. R) { PF[XE(i,vj,vk)] = KF[XE(i,vj,vk)]; KF[XE(i,vj,vk)] = F[XE(i,vj,vk)]; PU[XE(i,vj,vk)] = KU[XE(i,vj,vk)]; KU[XE(i,vj,vk)] = UC[XE(i,vj,vk)] } };
#endif
  /* ghosts: two ends that have both just closed e */
  for (vj : 0 .. N-1) { if :: NB(i,vj) && cl[vj]==ve && op[vj]==0 && st[vj]!=CRASHED ->
#if A_CONT
      if :: USED(UC[XE(i,vj,ve)]) && USED(UC[XE(vj,i,ve)]) && MC[vj*R+ve-1]!=0 ->
           assert(UC[XE(i,vj,ve)]==MC[vj*R+ve-1] && UC[XE(vj,i,ve)]==MC[i*R+ve-1]) :: else fi;
#endif
#if A_ACC==1
      if :: USED(UC[XE(i,vj,ve)]) && USED(UC[XE(vj,i,ve)]) && (A_CONT || (UC[XE(i,vj,ve)]==MC[vj*R+ve-1] && UC[XE(vj,i,ve)]==MC[i*R+ve-1])) ->
           assert(rec[X(i,vj)]==rec[X(vj,i)]);       /* after a use by both the records agree */
           for (vk : 1 .. R) { assert(F[XE(i,vj,vk)]==F[XE(vj,i,vk)]) }
      :: else fi;
#endif
      skip
    :: else fi };
  passed(i)
}
inline frame(i,j0) {
  printf("T %d gets frame%d(%d) from %d [next %d, content %d, record %d]\n",i,vt,ve,j0,vn,vc,vr);
  if :: vt==hello -> nx[X(i,j0)] = vn :: else -> nx[X(i,j0)] = (vn>nx[X(i,j0)] -> vn : nx[X(i,j0)]) fi;
  if
  :: vt==hello ->
       up[X(i,j0)] = 2;
#if FIXLIFE
       if :: vc!=pl[X(i,j0)] -> Oc[X(i,j0)] = 0; Or[X(i,j0)] = 0; We[X(i,j0)] = 0; Wc[X(i,j0)] = 0; Wr[X(i,j0)] = 0; hv[X(i,j0)] = 0; cd[X(i,j0)] = 0 :: else fi;
#endif
       pl[X(i,j0)] = vc;
       if :: op[i]!=0 && ROW(i,j0,op[i]) -> snd(i,j0,data,op[i],oc[i],rec[X(i,j0)]) :: else fi
  :: vt==data ->
       if :: ve<=cl[i] ->
            if :: USED(UC[XE(i,j0,ve)]) && (FIXSHA==0 || UC[XE(i,j0,ve)]==vc) -> snd(i,j0,have,ve,vc,0)
               :: else -> probe(7); snd(i,j0,closed,ve,vc,0) fi
       :: else ->
#if CMP==1
            if :: vr!=rec[X(i,j0)] -> va = EP(vr); vb = EP(rec[X(i,j0)]); if :: vb>va -> va = vb :: else fi; rec[X(i,j0)] = (va+1)*16; vk = 1; do :: vk<=R -> F[XE(i,j0,vk)] = 0; vk++ :: else -> break od :: else fi;
#endif
            if :: ve==op[i] -> Oc[X(i,j0)] = vc; Or[X(i,j0)] = vr
               :: ve!=op[i] && (FIXBUF || ve>=We[X(i,j0)]) -> We[X(i,j0)] = ve; Wc[X(i,j0)] = vc; Wr[X(i,j0)] = vr
               :: else -> probe(8) fi;
            snd(i,j0,have,ve,vc,0)
       fi
  :: vt==have -> if :: ve==op[i] && (FIXSHA==0 || vc==oc[i]) -> hv[X(i,j0)] = 1 :: else fi
  :: vt==closed -> if :: (FIXSHA==0 || vc==oc[i]) && ve>cd[X(i,j0)] -> cd[X(i,j0)] = ve :: else fi
  :: vt==at -> skip
  fi;
  vt = 0; ve = 0; vn = 0; vc = 0; vr = 0
}
#define verdict(i,vj) (decided(i,vj) -> 253 : (Oc[X(i,vj)]==0 -> 254 : (alive[A(i,vj)]==1 && up[X(i,vj)]==2 -> 255 : 252)))
inline giveup(i) {      /* ghost: why an opened exchange is left without being closed */
  for (vj : 0 .. N-1) { if :: ROW(i,vj,op[i]) -> UC[XE(i,vj,op[i])] = verdict(i,vj); printf("T %d leaves %d: verdict on %d is %d (253 decided, 254 patience, 255 patience with the data here, 252 the same and link down)\n",i,op[i],vj,verdict(i,vj)) :: else fi }
}
#define READ(i,vj) :: d_step { NB(i,vj) && st[i]!=CRASHED && st[i]!=LEFT && up[X(i,vj)]!=0 && nempty(q[X(vj,i)]) -> q[X(vj,i)]?vt,ve,vn,vc,vr; frame(i,vj) }
#define READOLD(i,vj) :: d_step { NB(i,vj) && st[i]!=CRASHED && st[i]!=LEFT && up[X(i,vj)]!=0 && nempty(oq[X(vj,i)]) -> printf("T   (from the old connection:)\n"); oq[X(vj,i)]?vt,ve,vn,vc,vr; frame(i,vj) }
#define NOTICE(i,vj) :: d_step { NB(i,vj) && st[i]!=CRASHED && st[i]!=LEFT && up[X(i,vj)]!=0 && (alive[A(i,vj)]==0 || (alive[A(i,vj)]==2 && empty(q[X(vj,i)]))) -> \
     printf("T %d notices that its connection to %d is down\n",i,vj); up[X(i,vj)] = 0; do :: nempty(q[X(vj,i)]) -> q[X(vj,i)]?vt,ve,vn,vc,vr :: empty(q[X(vj,i)]) -> break od; vt = 0; ve = 0; vn = 0; vc = 0; vr = 0 }

proctype Agent(byte i) {
  do
  READ(i,0) READ(i,1)
#if OLD
  READOLD(i,0) READOLD(i,1)
#endif
  NOTICE(i,0) NOTICE(i,1)
#if N==3
  READ(i,2) NOTICE(i,2)
#endif
  :: d_step { st[i]==RUN && rs[i] && ANY(isup,i) ->            /* after a restart: catch_up */
       rs[i] = 0; vn = cl[i]+1; lookahead(i);
       if :: ahead>vn -> catchup(i) :: else fi }
  :: d_step { st[i]==RUN && !rs[i] && op[i]==0 ->              /* local steps done: open the next exchange */
       vn = cl[i]+1; lookahead(i);
       if
       :: HOP(vn)==0 && ahead>vn && ahead-vn>=CATCH -> catchup(i)
       :: HOP(vn)==0 && !(ahead>vn && ahead-vn>=CATCH) && (ahead>vn && (ahead-vn>=2 || !back)) ->
            probe(2);
#if FIXHOP
            tgt = FIRST(ahead);
            if :: tgt>R -> cl[i] = R; passed(i) :: else -> setopen(i,tgt,tgt) fi
#else
            tgt = (ahead>R -> R : ahead); setopen(i,tgt,vn)
#endif
       :: else -> setopen(i,vn,vn)
       fi }
  :: d_step { st[i]==RUN && op[i]!=0 && ALL(through,i) && ANY(nbuse,i) -> closeit(i) }
  :: d_step { st[i]==RUN && op[i]!=0 && ALL(through,i) && !ANY(nbuse,i) && ANY(over,i) ->   /* only late: relabel */
       vn = op[i]; lookahead(i); giveup(i); probe(3);
       if
       :: LATE && ahead-vn>=CATCH ->               /* too late to take part with this message: catch up */
            cl[i] = FIRST(vn+1)-1; rs[i] = 1; printf("T %d is too late in %d\n",i,vn); passed(i)
       :: else ->
#if FIXHOP
       tgt = FIRST(ahead);
       if :: tgt>R -> cl[i] = R; passed(i)
          :: tgt<=R && HOP(op[i])==0 -> vc = oc[i]&7; setopen(i,tgt,vc)
          :: else -> cl[i] = tgt-1; passed(i) fi
#else
       if :: ahead>R -> cl[i] = R; printf("T %d: all ahead are done, done\n",i); passed(i)
          :: else -> vc = oc[i]&7; setopen(i,ahead,vc) fi
#endif
       fi; vc = 0 }
#if SCHED
  :: d_step { st[i]==RUN && op[i]!=0 && ALL(through,i) && !ANY(nbuse,i) && !ANY(over,i) && (!ANY(inrow,i) || ANY(other,i)) ->
       printf("T %d has no partner in %d, others are there\n",i,op[i]); closeit(i) }
#endif
  :: d_step { NOALONE==0 && st[i]==RUN && op[i]!=0 && ALL(through,i) && !ANY(nbuse,i) && !ANY(over,i) && ANY(isup,i) -> /* up, nobody answers */
#if A_BACK
       assert(!ALL(nofire,i));
#endif
       probe(6); closeit(i) }
  :: d_step { st[i]==DONE && ALL(bye,i) ->
       st[i] = LEFT; nleft++; printf("T %d leaves\n",i);
       for (vj : 0 .. N-1) { if :: NB(i,vj) -> up[X(i,vj)] = 0; if :: alive[A(i,vj)]==1 -> alive[A(i,vj)] = 2 :: else fi;
           do :: nempty(q[X(vj,i)]) -> q[X(vj,i)]?vt,ve,vn,vc,vr :: empty(q[X(vj,i)]) -> break od :: else fi };
       vt = 0; ve = 0; vn = 0; vc = 0; vr = 0 }
  :: st[i]==LEFT -> break
  od
}

#define BREAK(i,vj) :: d_step { NB(i,vj) && nb>0 && alive[X(i,vj)]==1 -> alive[X(i,vj)] = 0; nb--; printf("T BREAK %d-%d\n",i,vj) }
#if OLD
#define MOVE(i,vj) do :: nempty(q[X(i,vj)]) -> q[X(i,vj)]?vt,ve,vn,vc,vr; assert(nfull(oq[X(i,vj)])); oq[X(i,vj)]!vt,ve,vn,vc,vr :: empty(q[X(i,vj)]) -> break od
#define CONNECT(i,vj) :: d_step { NB(i,vj) && alive[X(i,vj)]==0 && (st[i]==RUN||st[i]==DONE) && (st[vj]==RUN||st[vj]==DONE) -> \
     MOVE(i,vj); MOVE(vj,i); vt = 0; ve = 0; vn = 0; vc = 0; vr = 0; alive[X(i,vj)] = 1; printf("T RECONNECT %d-%d\n",i,vj); up[X(i,vj)] = 1; up[X(vj,i)] = 1; \
     snd(i,vj,hello,0,life[i],0); snd(vj,i,hello,0,life[vj],0) }
#else
#define CONNECT(i,vj) :: d_step { NB(i,vj) && alive[X(i,vj)]==0 && up[X(i,vj)]==0 && up[X(vj,i)]==0 && (st[i]==RUN||st[i]==DONE) && (st[vj]==RUN||st[vj]==DONE) -> \
     assert(empty(q[X(i,vj)]) && empty(q[X(vj,i)])); alive[X(i,vj)] = 1; printf("T RECONNECT %d-%d\n",i,vj); up[X(i,vj)] = 1; up[X(vj,i)] = 1; \
     snd(i,vj,hello,0,life[i],0); snd(vj,i,hello,0,life[vj],0) }
#endif
#define CRASH(i) :: d_step { nk>0 && cl[i]>=KMIN && (st[i]==RUN || st[i]==DONE) -> nk--; st[i] = CRASHED; printf("T CRASH %d\n",i); \
     for (vj : 0 .. N-1) { if :: NB(i,vj) -> up[X(i,vj)] = 0; if :: alive[A(i,vj)]==1 -> alive[A(i,vj)] = 0 :: else fi; \
        do :: nempty(q[X(vj,i)]) -> q[X(vj,i)]?vt,ve,vn,vc,vr :: empty(q[X(vj,i)]) -> break od :: else fi }; vt = 0; ve = 0; vn = 0; vc = 0; vr = 0 }
#if RESUME
#define LOADREC(i,vj,lag) rec[X(i,vj)] = (lag -> prec[X(i,vj)] : krec[X(i,vj)]); krec[X(i,vj)] = rec[X(i,vj)]; \
   for (vk : 1 .. R) { F[XE(i,vj,vk)] = (lag -> PF[XE(i,vj,vk)] : KF[XE(i,vj,vk)]); KF[XE(i,vj,vk)] = F[XE(i,vj,vk)]; UC[XE(i,vj,vk)] = (lag -> PU[XE(i,vj,vk)] : KU[XE(i,vj,vk)]); KU[XE(i,vj,vk)] = UC[XE(i,vj,vk)] }
#else
#define LOADREC(i,vj,lag) rec[X(i,vj)] = 0; for (vk : 1 .. R) { F[XE(i,vj,vk)] = 0; UC[XE(i,vj,vk)] = 0 }
#endif
#define RESTART(i,lag) :: d_step { st[i]==CRASHED && (lag==0 || (cl[i]>0 && (LAG==1 || (LAG==2 && cl[i]<R)))) -> \
     life[i]++; cl[i] = cl[i]-lag; printf("T RESTART %d: life %d, closed through %d\n",i,life[i],cl[i]); op[i] = 0; oc[i] = 0; \
     for (vj : 0 .. N-1) { if :: NB(i,vj) -> nx[X(i,vj)] = 0; pl[X(i,vj)] = 0; Oc[X(i,vj)] = 0; Or[X(i,vj)] = 0; We[X(i,vj)] = 0; Wc[X(i,vj)] = 0; Wr[X(i,vj)] = 0; \
        hv[X(i,vj)] = 0; cd[X(i,vj)] = 0; ms[X(i,vj)] = 0; LOADREC(i,vj,lag) :: else fi }; \
     if :: cl[i]>=R -> st[i] = DONE; rs[i] = 0 :: else -> st[i] = RUN; rs[i] = 1 fi }

init {
  d_step {
    va = 0;
    for (va : 0 .. N-1) { for (vb : 0 .. N-1) { if :: NB(va,vb) -> alive[A(va,vb)] = 1; up[X(va,vb)] = 1; snd(va,vb,hello,0,0,0) :: else fi } };
    va = 0; vb = 0
  };
  if :: nb = 0 :: B>0 -> nb = 1 :: B>1 -> nb = 2 :: B>2 -> nb = 3 fi;
  if :: nk = 0 :: K>0 -> nk = 1 :: K>1 -> nk = 2 fi;
  atomic { run Agent(0); run Agent(1);
#if N==3
    run Agent(2)
#endif
  };
  do
  BREAK(0,1) CONNECT(0,1) CRASH(0) CRASH(1) RESTART(0,0) RESTART(1,0)
#if LAG
  RESTART(0,1) RESTART(1,1)
#endif
#if N==3
  BREAK(1,2) CONNECT(1,2) BREAK(0,2) CONNECT(0,2) CRASH(2) RESTART(2,0)
#if LAG
  RESTART(2,1)
#endif
#endif
  :: nleft==N -> break
  od;
  nb = 0;
  d_step {
    va = 0;
    for (va : 0 .. N-1) { for (vb : 0 .. N-1) { if :: NB(va,vb) -> for (vk : 1 .. R) {
#if A_ALL
      assert(USED(UC[XE(va,vb,vk)]) || !ROW(va,vb,vk));
#endif
#if A_SIDED==1
      assert(USED(UC[XE(va,vb,vk)])==USED(UC[XE(vb,va,vk)]));
#elif A_SIDED==2
      assert(!USED(UC[XE(va,vb,vk)]) || USED(UC[XE(vb,va,vk)]) || UC[XE(vb,va,vk)]==255 || UC[XE(vb,va,vk)]==252);
#elif A_SIDED==3
      assert(!USED(UC[XE(va,vb,vk)]) || USED(UC[XE(vb,va,vk)]) || UC[XE(vb,va,vk)]==252);
#endif
      skip } :: else fi } };
    va = 0
  }
}

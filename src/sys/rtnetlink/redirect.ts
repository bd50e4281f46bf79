/**
 * Traffic control, tc(8): everything that arrives at one interface leaves by another, before this host's own network stack
 * sees any of it. That takes a queueing discipline for what arrives (tc-ingress), and in it a filter that matches every packet
 * (tc-u32, which every distribution's kernel has; tc-matchall is missing from some) with the action tc-mirred.
 * Constants: linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h.
 */
import { attribute, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, nested, text } from './message.ts';
import type { RtnetlinkSocket } from './socket.ts';

const RTM_NEWQDISC = 36;
const RTM_DELQDISC = 37;
const RTM_NEWTFILTER = 44;

const TCA_KIND = 1;
const TCA_OPTIONS = 2;

/** Where the discipline for what arrives is, and its own number, "ffff:". */
const TC_H_INGRESS = 0xfffffff1;
const INGRESS_HANDLE = 0xffff0000;

const TCA_U32_SEL = 5;
const TCA_U32_ACT = 7;
const TC_U32_TERMINAL = 1;
/** struct tc_u32_sel with one struct tc_u32_key: flags and the number of keys are in its bytes 0 and 2. */
const U32_SEL_SIZE = 16 + 16;

const TCA_ACT_KIND = 1;
const TCA_ACT_OPTIONS = 2;
const TCA_MIRRED_PARMS = 2;
/** struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex, 4 bytes each. */
const MIRRED_SIZE = 28;
const TC_ACT_STOLEN = 4;
const TCA_EGRESS_REDIR = 1;

/** linux/if_ether.h: every protocol, in network order as tc has it. */
const ETH_P_ALL_BE = 0x0300;
const FILTER_PRIORITY = 1;

/** struct tcmsg: family, 3 bytes of padding, index i32, handle, parent and info of 4 bytes each. */
const TCMSG_SIZE = 20;

function tcmsg(index: number, handle: number, parent: number, info = 0): Buffer {
  const bytes = Buffer.alloc(TCMSG_SIZE);
  bytes.writeInt32LE(index, 4);
  bytes.writeUInt32LE(handle, 8);
  bytes.writeUInt32LE(parent, 12);
  bytes.writeUInt32LE(info, 16);
  return bytes;
}

/** Everything that arrives at `from` leaves by `to`, both interfaces' indices. @throws SysError EEXIST when there is such a thing already */
export function redirect(socket: RtnetlinkSocket, from: number, to: number): void {
  const what = `redirect of interface ${from} to ${to}`;
  socket.request(
    what,
    RTM_NEWQDISC,
    NLM_F_CREATE | NLM_F_EXCL,
    tcmsg(from, INGRESS_HANDLE, TC_H_INGRESS),
    attribute(TCA_KIND, text('ingress')),
  );
  const everything = Buffer.alloc(U32_SEL_SIZE);
  everything.writeUInt8(TC_U32_TERMINAL, 0);
  everything.writeUInt8(1, 2);
  const mirred = Buffer.alloc(MIRRED_SIZE);
  mirred.writeInt32LE(TC_ACT_STOLEN, 8);
  mirred.writeInt32LE(TCA_EGRESS_REDIR, 20);
  mirred.writeUInt32LE(to, 24);
  const action = nested(
    1,
    attribute(TCA_ACT_KIND, text('mirred')),
    nested(TCA_ACT_OPTIONS, attribute(TCA_MIRRED_PARMS, mirred)),
  );
  try {
    socket.request(
      what,
      RTM_NEWTFILTER,
      NLM_F_CREATE | NLM_F_REPLACE,
      tcmsg(from, 0, INGRESS_HANDLE, (FILTER_PRIORITY << 16) | ETH_P_ALL_BE),
      attribute(TCA_KIND, text('u32')),
      nested(TCA_OPTIONS, attribute(TCA_U32_SEL, everything), nested(TCA_U32_ACT, action)),
    );
  } catch (error) {
    endRedirect(socket, from);
    throw error;
  }
}

/** Takes back what `redirect` has done at `from`. @throws SysError */
export function endRedirect(socket: RtnetlinkSocket, from: number): void {
  const what = `end of the redirect of interface ${from}`;
  socket.request(what, RTM_DELQDISC, 0, tcmsg(from, INGRESS_HANDLE, TC_H_INGRESS));
}

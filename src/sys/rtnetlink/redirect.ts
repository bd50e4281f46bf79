/**
 * Traffic control, tc(8): everything that arrives at one interface leaves by another, before this host's own network stack
 * sees any of it. That takes a queueing discipline for what arrives (tc-ingress), and in it a filter that matches every packet
 * (tc-u32, which every distribution's kernel has; tc-matchall is missing from some) with the action tc-mirred. Filters before
 * it make exceptions.
 * Constants: linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h.
 */
import { attribute, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, nested, text } from './message.ts';
import type { RtnetlinkSocket } from './socket.ts';

const RTM_NEWQDISC = 36;
const RTM_DELQDISC = 37;
const RTM_NEWTFILTER = 44;
const RTM_DELTFILTER = 45;

const TCA_KIND = 1;
const TCA_OPTIONS = 2;

/** Where the discipline for what arrives is, and its own number, "ffff:". */
const TC_H_INGRESS = 0xfffffff1;
const INGRESS_HANDLE = 0xffff0000;

const TCA_U32_SEL = 5;
const TCA_U32_ACT = 7;
const TC_U32_TERMINAL = 1;
/** struct tc_u32_sel without its keys: flags and the number of keys are in its bytes 0 and 2. */
const U32_SEL_SIZE = 16;
/** struct tc_u32_key: mask, value and offset, and a mask for that, 4 bytes each. */
const U32_KEY_SIZE = 16;

const TCA_ACT_KIND = 1;
const TCA_ACT_OPTIONS = 2;
const TCA_MIRRED_PARMS = 2;
/** struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex, 4 bytes each. */
const MIRRED_SIZE = 28;
const TC_ACT_OK = 0;
const TC_ACT_STOLEN = 4;
const TCA_EGRESS_REDIR = 1;
const TCA_EGRESS_MIRROR = 2;

/** linux/if_ether.h, in network order as tc has it. */
const ETH_P_ALL_BE = 0x0300;
const ETH_P_IP_BE = 0x0008;
const ETH_P_ARP_BE = 0x0608;

/** Priorities: the lowest number comes first, and each protocol has its own. */
const ANSWERS_PRIORITY = 1;
const ARP_PRIORITY = 2;
const EVERYTHING_PRIORITY = 10;

/** What a word of the packet, from the network header's beginning on, has to be. */
interface Key {
  readonly offset: number;
  readonly mask: number;
  readonly value: number;
}

interface Filter {
  readonly priority: number;
  readonly protocol: number;
  readonly keys: readonly Key[];
  /** Without one, this host's network stack gets the packet. */
  readonly action?: Buffer;
}

/**
 * The ports from which this namespace's own network stack asks name servers where `admitAnswers` is in force, for
 * net.ipv4.ip_local_port_range: above those that a guest's kernel chooses by itself, and a mask in a filter.
 */
export const askingPorts = { first: 0xf000, last: 0xffff };

/** An answer of a name server, IPv4 without options, to one of these ports: RFC 791, 768, 9293. */
function answerBy(protocol: number): readonly Key[] {
  return [
    { offset: 0, mask: 0xff000000, value: 0x45000000 },
    { offset: 8, mask: 0x00ff0000, value: protocol << 16 },
    { offset: 20, mask: 0xfffff000, value: (53 << 16) | askingPorts.first },
  ];
}
const UDP = 17;
const TCP = 6;

/** RFC 826: the operation is a reply. */
const arpReply: readonly Key[] = [{ offset: 4, mask: 0x0000ffff, value: 2 }];

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

function addFilter(socket: RtnetlinkSocket, what: string, from: number, filter: Filter): void {
  const { priority, protocol, keys, action } = filter;
  const selector = Buffer.alloc(U32_SEL_SIZE + U32_KEY_SIZE * keys.length);
  selector.writeUInt8(TC_U32_TERMINAL, 0);
  selector.writeUInt8(keys.length, 2);
  for (const [index, { offset, mask, value }] of keys.entries()) {
    const at = U32_SEL_SIZE + U32_KEY_SIZE * index;
    selector.writeUInt32BE(mask, at);
    selector.writeUInt32BE(value, at + 4);
    selector.writeInt32LE(offset, at + 8);
  }
  const actions = action === undefined ? [] : [nested(TCA_U32_ACT, action)];
  socket.request(
    what,
    RTM_NEWTFILTER,
    NLM_F_CREATE | NLM_F_REPLACE,
    tcmsg(from, 0, INGRESS_HANDLE, ((priority << 16) | protocol) >>> 0),
    attribute(TCA_KIND, text('u32')),
    nested(TCA_OPTIONS, attribute(TCA_U32_SEL, selector), ...actions),
  );
}

/** tc-mirred: the packet, or a copy of it, leaves by an interface. */
function mirred(how: number, then: number, to: number): Buffer {
  const parameters = Buffer.alloc(MIRRED_SIZE);
  parameters.writeInt32LE(then, 8);
  parameters.writeInt32LE(how, 20);
  parameters.writeUInt32LE(to, 24);
  return nested(
    1,
    attribute(TCA_ACT_KIND, text('mirred')),
    nested(TCA_ACT_OPTIONS, attribute(TCA_MIRRED_PARMS, parameters)),
  );
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
  try {
    addFilter(socket, what, from, {
      priority: EVERYTHING_PRIORITY,
      protocol: ETH_P_ALL_BE,
      keys: [{ offset: 0, mask: 0, value: 0 }],
      action: mirred(TCA_EGRESS_REDIR, TC_ACT_STOLEN, to),
    });
  } catch (error) {
    endRedirect(socket, from);
    throw error;
  }
}

/**
 * An exception to `redirect`: answers of name servers to `askingPorts` come to this namespace's own network stack, and what
 * ARP answers does, too. The other side gets a copy, but not of what comes by TCP, which two stacks cannot both answer.
 *
 * @throws SysError
 */
export function admitAnswers(socket: RtnetlinkSocket, from: number, to: number): void {
  const what = `name servers' answers at interface ${from}`;
  const copy = mirred(TCA_EGRESS_MIRROR, TC_ACT_OK, to);
  // An earlier kilnd may have made them.
  for (const [priority, protocol] of [
    [ANSWERS_PRIORITY, ETH_P_IP_BE],
    [ARP_PRIORITY, ETH_P_ARP_BE],
  ] as const) {
    ignoringAbsence(() => {
      const info = ((priority << 16) | protocol) >>> 0;
      socket.request(what, RTM_DELTFILTER, 0, tcmsg(from, 0, INGRESS_HANDLE, info));
    });
  }
  const answers = { priority: ANSWERS_PRIORITY, protocol: ETH_P_IP_BE };
  addFilter(socket, what, from, { ...answers, keys: answerBy(UDP), action: copy });
  addFilter(socket, what, from, { ...answers, keys: answerBy(TCP) });
  addFilter(socket, what, from, { priority: ARP_PRIORITY, protocol: ETH_P_ARP_BE, keys: arpReply, action: copy });
}

function ignoringAbsence(action: () => void): void {
  try {
    action();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
}

/** Takes back what `redirect` has done at `from`. @throws SysError */
export function endRedirect(socket: RtnetlinkSocket, from: number): void {
  const what = `end of the redirect of interface ${from}`;
  socket.request(what, RTM_DELQDISC, 0, tcmsg(from, INGRESS_HANDLE, TC_H_INGRESS));
}

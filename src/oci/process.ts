/** Rules of process's members that are more than a word. What is applied is applied by crun, or by the agent. */
import { KilnError } from '../errors.ts';
import { drop, keep, type Rules, type Translation, translate } from './field-rules.ts';
import type { Integer } from './json.ts';

/** Windows has names instead. */
export const userRules: Rules = { uid: keep, gid: keep, umask: keep, additionalGids: keep, username: drop() };

/** capabilities(7), in the order of their numbers, up to Linux 5.9; there has been none since. */
export const capabilities: ReadonlySet<string> = new Set(
  [
    ...['CHOWN', 'DAC_OVERRIDE', 'DAC_READ_SEARCH', 'FOWNER', 'FSETID', 'KILL', 'SETGID', 'SETUID', 'SETPCAP'],
    ...['LINUX_IMMUTABLE', 'NET_BIND_SERVICE', 'NET_BROADCAST', 'NET_ADMIN', 'NET_RAW', 'IPC_LOCK', 'IPC_OWNER'],
    ...['SYS_MODULE', 'SYS_RAWIO', 'SYS_CHROOT', 'SYS_PTRACE', 'SYS_PACCT', 'SYS_ADMIN', 'SYS_BOOT', 'SYS_NICE'],
    ...['SYS_RESOURCE', 'SYS_TIME', 'SYS_TTY_CONFIG', 'MKNOD', 'LEASE', 'AUDIT_WRITE', 'AUDIT_CONTROL', 'SETFCAP'],
    ...['MAC_OVERRIDE', 'MAC_ADMIN', 'SYSLOG', 'WAKE_ALARM', 'BLOCK_SUSPEND', 'AUDIT_READ', 'PERFMON', 'BPF'],
    'CHECKPOINT_RESTORE',
  ].map((name) => `CAP_${name}`),
);

/** The spec wants a warning for a capability that cannot be given, and no error. */
const capabilitySet = translate<readonly string[]>((names, path, { warnings }) => {
  const unknown = names.filter((name) => !capabilities.has(name.toUpperCase()));
  if (unknown.length === 0) return names;
  warnings.push(`${path}: ${unknown.join(', ')} is not given: no such capability is known`);
  return names.filter((name) => !unknown.includes(name));
});

export const capabilityRules: Rules = {
  bounding: capabilitySet,
  effective: capabilitySet,
  inheritable: capabilitySet,
  permitted: capabilitySet,
  ambient: capabilitySet,
};

/** getrlimit(2). RLIMIT_OFILE is RLIMIT_NOFILE's old name, and crun does not know it. */
const rlimitTypes = new Set(
  [
    ...['AS', 'CORE', 'CPU', 'DATA', 'FSIZE', 'LOCKS', 'MEMLOCK', 'MSGQUEUE', 'NICE', 'NOFILE', 'NPROC', 'RSS'],
    ...['RTPRIO', 'RTTIME', 'SIGPENDING', 'STACK'],
  ].map((name) => `RLIMIT_${name}`),
);

/** @throws KilnError invalid-argument for a type that does not exist or comes twice */
export const rlimits = translate<readonly { readonly type: string }[]>((limits, path) => {
  const seen = new Set<string>();
  for (const [index, { type }] of limits.entries()) {
    const refuse = (reason: string): never => {
      throw new KilnError('invalid-argument', `${path}[${index}].type: ${type} ${reason}`);
    };
    if (!rlimitTypes.has(type)) refuse('is no resource that can be limited');
    if (seen.has(type)) refuse('is listed twice');
    seen.add(type);
  }
  return limits;
});

/** sched(7). SCHED_ISO is in the spec, but no Linux has it. */
const policies = ['SCHED_OTHER', 'SCHED_FIFO', 'SCHED_RR', 'SCHED_BATCH', 'SCHED_IDLE', 'SCHED_DEADLINE'];

/** sched_setattr(2); for SCHED_FLAG_UTIL_CLAMP_MIN and _MAX the spec has no values. */
const schedulerFlags = [
  ...['SCHED_FLAG_RESET_ON_FORK', 'SCHED_FLAG_RECLAIM', 'SCHED_FLAG_DL_OVERRUN'],
  ...['SCHED_FLAG_KEEP_POLICY', 'SCHED_FLAG_KEEP_PARAMS'],
];

interface Scheduler {
  readonly policy?: unknown;
  readonly flags?: readonly unknown[];
}

/** @throws KilnError invalid-argument for a policy or flag that Linux does not have */
export const scheduler = translate<Scheduler>((value, path) => {
  requireOneOf(value.policy, policies, `${path}.policy`);
  for (const [index, flag] of (value.flags ?? []).entries()) {
    requireOneOf(flag, schedulerFlags, `${path}.flags[${index}]`);
  }
  return value;
});

const ioClasses = ['IOPRIO_CLASS_RT', 'IOPRIO_CLASS_BE', 'IOPRIO_CLASS_IDLE'];

/** @throws KilnError invalid-argument for a class or priority that Linux does not have */
export const ioPriority = translate<{ readonly class?: unknown; readonly priority?: Integer }>((value, path) => {
  requireOneOf(value.class, ioClasses, `${path}.class`);
  const { priority = 0 } = value;
  if (priority >= 0 && priority <= 7) return value;
  throw new KilnError('invalid-argument', `${path}.priority: expected 0 to 7, received ${priority}`);
});

export const apparmorProfile = translate<string>((profile, path, { warnings }: Translation) => {
  // "unconfined" is what the guest does anyway.
  if (profile !== '' && profile !== 'unconfined') {
    warnings.push(`${path}: "${profile}" is not applied: AppArmor is not active in the guest`);
  }
  return undefined;
});

/** @throws KilnError invalid-argument that lists what is allowed */
export function requireOneOf(value: unknown, allowed: readonly string[], path: string): void {
  if (typeof value === 'string' && allowed.includes(value)) return;
  const received = value === undefined ? 'is missing' : `${JSON.stringify(value)} is not known`;
  throw new KilnError('invalid-argument', `${path}: ${received}; expected ${allowed.join(', ')}`);
}

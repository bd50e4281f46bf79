import { KilnError } from '../errors.ts';
import { drop, keep, type Rules, translate } from './field-rules.ts';

const notify = 'SCMP_ACT_NOTIFY';

const flagsWithoutAgent = ['SECCOMP_FILTER_FLAG_TSYNC', 'SECCOMP_FILTER_FLAG_LOG', 'SECCOMP_FILTER_FLAG_SPEC_ALLOW'];

/** Flags of seccomp(2) that crun 1.8 knows. */
const flags = [...flagsWithoutAgent, 'SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV'];

/** What of seccomp can be asked for: crun 1.8 with libseccomp 2.5, on the guest's kernel. */
export const seccompFeatures = {
  enabled: true,
  actions: ['ALLOW', 'ERRNO', 'KILL', 'KILL_PROCESS', 'KILL_THREAD', 'LOG', 'TRACE', 'TRAP'].map(
    (action) => `SCMP_ACT_${action}`,
  ),
  operators: ['EQ', 'GE', 'GT', 'LE', 'LT', 'MASKED_EQ', 'NE'].map((operator) => `SCMP_CMP_${operator}`),
  // Others name no call of the guest's kernel, and crun refuses those of the other byte order.
  archs: ['SCMP_ARCH_X32', 'SCMP_ARCH_X86', 'SCMP_ARCH_X86_64'],
  knownFlags: flags,
  // The other one is for filters with an agent, and refused by the kernel without.
  supportedFlags: flagsWithoutAgent,
} as const;

/** Actions are crun's to judge, but for the one that asks an agent on the host, which cannot see the guest's processes. */
function refuseNotify(action: unknown, path: string): void {
  if (action !== notify) return;
  throw new KilnError('unimplemented', `${path}: a seccomp agent on the host cannot serve a container in a VM`);
}

export const seccompRules: Rules = {
  defaultAction: translate<string>((action, path) => {
    refuseNotify(action, path);
    return action;
  }),
  defaultErrnoRet: keep,
  architectures: keep,
  flags: translate<readonly string[]>((given, path) => {
    const index = given.findIndex((flag) => !flags.includes(flag));
    if (index === -1) return given;
    throw new KilnError('invalid-argument', `${path}[${index}]: ${given[index]} is no flag of seccomp that is known`);
  }),
  // Of no use without the action that is refused above; the spec says that they are ignored then.
  listenerPath: drop(),
  listenerMetadata: drop(),
  syscalls: translate<readonly { readonly action?: unknown }[]>((syscalls, path) => {
    for (const [index, { action }] of syscalls.entries()) refuseNotify(action, `${path}[${index}].action`);
    return syscalls;
  }),
};

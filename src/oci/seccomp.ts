import { KilnError } from '../errors.ts';
import { drop, keep, type Rules, translate } from './field-rules.ts';

const notify = 'SCMP_ACT_NOTIFY';

/** Flags of seccomp(2) that crun 1.8 knows. */
const flags = [
  ...['SECCOMP_FILTER_FLAG_TSYNC', 'SECCOMP_FILTER_FLAG_LOG', 'SECCOMP_FILTER_FLAG_SPEC_ALLOW'],
  'SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV',
];

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

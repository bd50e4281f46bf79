import { KilnError } from '../errors.ts';
import type { Translation } from './field-rules.ts';

/** Kernel parameters that each container has of its own: those of its IPC namespace. runc and crun have the same list. */
const ipcParameters = new Set([
  ...['kernel/msgmax', 'kernel/msgmnb', 'kernel/msgmni', 'kernel/sem'],
  ...['kernel/shmall', 'kernel/shmmax', 'kernel/shmmni', 'kernel/shm_rmid_forced'],
]);

/**
 * linux.sysctl: parameters of the container's IPC and UTS namespaces are set by crun. Those of the network are the
 * guest's own, as its network is the container's. Others would change the whole kernel, which the
 * spec does not mean, and runc refuses.
 *
 * @throws KilnError invalid-argument, naming the parameter
 */
export function translateSysctl(
  sysctl: Readonly<Record<string, string>>,
  path: string,
  { domainname, mapsIds }: Translation,
): object {
  for (const [name, value] of Object.entries(sysctl)) {
    const refuse = (reason: string): never => {
      throw new KilnError('invalid-argument', `${path}["${name}"]: ${reason}`);
    };
    const parts = parameterPath(name);
    const parameter = parts.join('/');
    if (parts.some((part) => part === '' || part === '.' || part === '..')) refuse('this is no name of a parameter');
    if (parameter === 'kernel/hostname') refuse('the hostname is set by the field hostname');
    if (parameter === 'kernel/domainname') {
      if (![undefined, '', value].includes(domainname)) refuse('the field domainname says otherwise');
      continue;
    }
    if (isOfNetwork(name) && mapsIds) refuse('the network is not of the user namespace that the container has');
    if (isOfNetwork(name) || parameter.startsWith('fs/mqueue/') || ipcParameters.has(parameter)) continue;
    refuse('this parameter is not of a namespace but of the whole kernel');
  }
  return sysctl;
}

/** Whether a parameter belongs to the network namespace. */
export function isOfNetwork(name: string): boolean {
  return /^net[./]/.test(name);
}

/** sysctl.d(5): whichever of `.` and `/` comes first separates; the other is part of a name (`net/…/eth0.1/…`). */
function parameterPath(name: string): readonly string[] {
  const separator = /[./]/.exec(name)?.[0] ?? '.';
  return name.split(separator);
}

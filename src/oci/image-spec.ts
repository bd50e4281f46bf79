/** The spec of a container of an image: image-spec, conversion.md, with what Docker gives a container beside. */
import { KilnError } from '../errors.ts';
import { defaultSpec } from './default-spec.ts';
import type { Spec } from './spec.ts';

/** Docker's and containerd's; images rely on them. */
const capabilities = [
  ...['CHOWN', 'DAC_OVERRIDE', 'FSETID', 'FOWNER', 'MKNOD', 'NET_RAW', 'SETGID', 'SETUID', 'SETFCAP', 'SETPCAP'],
  ...['NET_BIND_SERVICE', 'SYS_CHROOT', 'KILL', 'AUDIT_WRITE'],
].map((name) => `CAP_${name}`);

const defaultPath = 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';

/** What an image's configuration says of its containers. */
export interface ImageProcess {
  readonly Env?: readonly string[] | null | undefined;
  readonly Entrypoint?: readonly string[] | null | undefined;
  readonly Cmd?: readonly string[] | null | undefined;
  readonly WorkingDir?: string | null | undefined;
}

export interface ImageSpecOptions {
  readonly image: ImageProcess;
  /** In place of the image's Cmd; none where it is empty. */
  readonly command: readonly string[];
  readonly user: { readonly uid: number; readonly gid: number; readonly additionalGids: readonly number[] };
  readonly hostname: string;
  readonly terminal: boolean;
}

/** @throws KilnError invalid-argument for an image that names no program */
export function imageSpec({ image, command, user, hostname, terminal }: ImageSpecOptions): Spec {
  const { Env, Entrypoint, Cmd, WorkingDir } = image;
  const args = [...(Entrypoint ?? []), ...(command.length > 0 ? command : (Cmd ?? []))];
  if (args.length === 0) {
    throw new KilnError('invalid-argument', 'the image names no program to run', {
      hint: 'give one: kiln run --image FILE ID -- COMMAND',
    });
  }
  const env = [...(Env ?? [])];
  if (!env.some((variable) => variable.startsWith('PATH='))) env.unshift(defaultPath);
  if (terminal && !env.some((variable) => variable.startsWith('TERM='))) env.push('TERM=xterm');
  const cwd = WorkingDir ? WorkingDir : '/';
  return {
    ...defaultSpec,
    process: {
      ...defaultSpec.process,
      ...{ terminal, user, args, env, cwd: cwd.startsWith('/') ? cwd : `/${cwd}` },
      capabilities: { bounding: capabilities, effective: capabilities, permitted: capabilities },
      // Images have sudo and the like.
      noNewPrivileges: false,
    } as Spec['process'],
    root: { path: 'rootfs', readonly: false },
    hostname,
  };
}

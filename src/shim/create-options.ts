/** What Kiln's own command line says at Create and Exec beside containerd's words: proto/kiln/oci/v1/create.proto. */
import type { Any } from '../../gen/google/protobuf/any.ts';
import { CreateOptions } from '../../gen/kiln/oci/v1/create.ts';
import type { TaskRequest } from './task.ts';

const typeUrl = 'kiln.oci.v1.CreateOptions';

export function encodeCreateOptions(options: CreateOptions): Any {
  return { typeUrl, value: Buffer.from(CreateOptions.encode(options).finish()) };
}

/** Undefined for a Create of containerd's. */
export function createOptionsOf({ options }: TaskRequest): CreateOptions | undefined {
  return options?.typeUrl === typeUrl ? CreateOptions.decode(options.value) : undefined;
}

/**
 * Type of an Exec's process: containerd's typeurl of the runtime-spec's, before which a sender may write what it likes. It has to
 * be one that a kilnd of any version takes.
 *
 * @param processPid of the process on the host that stands for it
 */
export function execTypeUrl(processPid: number): string {
  return `kiln.oci.v1/stand-in/${processPid}/opencontainers/runtime-spec/1/Process`;
}

/** Undefined for an Exec of containerd's. */
export function standInOfExec(type: string): number | undefined {
  const pid = /^kiln\.oci\.v1\/stand-in\/(\d{1,9})\//.exec(type)?.[1];
  return pid === undefined ? undefined : Number(pid);
}

import { readFileSync } from 'node:fs';
import path from 'node:path';
import { z } from 'zod';
import { KilnError } from '../errors.ts';
import { identityRecord } from '../host/process-identity.ts';
import { replaceFile } from '../host/replace-file.ts';
import type { SlotName } from '../vmm/vmm.ts';
import type { HookPlan } from './hooks.ts';
import { volumeCaches } from './volumes.ts';

/*
 * What kilnd writes down of a container, in the container's directory, so that the next kilnd finds it again when this
 * one is killed. The file appears when the container is created; what was under way before that is undone by whoever
 * finds it without a record. It is replaced with every change, complete, by rename(2).
 */

const common = {
  version: z.literal(1),
  id: z.string(),
  terminal: z.boolean(),
  standIn: identityRecord,
  /** The stand-in is a process of the caller's, which ends by itself. */
  standInIsCallers: z.boolean().optional(),
  /** For poststop. Kilnd itself has made it of a spec that was checked. */
  hooks: z.custom<HookPlan>((value) => typeof value === 'object' && value !== null),
  /** Processes of it that were killed for want of memory, as far as it was told. */
  oomKills: z.int().nonnegative(),
  /** Set when the init process has ended. */
  exit: z.object({ status: z.int().min(0).max(255), atMs: z.number() }).optional(),
};

/** Of whoever has a VM: see SandboxRecord. */
const ofVm = {
  vmm: z.string(),
  session: z.string(),
  /** Milliseconds. */
  answerLimitMs: z.number().positive(),
  /** The VMM's own. */
  vm: z.record(z.string(), z.unknown()),
  vmDirectory: z.string().optional(),
  volumeCache: z.enum(volumeCaches).optional(),
  /** See VolumesRecord. */
  volumes: z.object({ server: z.record(z.string(), z.unknown()), connected: z.boolean() }).optional(),
};

const ofFiles = {
  disks: z.object({ lower: z.string().nullable(), writable: z.string().nullable() }),
  /** See ChangesPlan. */
  changes: z
    .object({
      upper: z.object({ path: z.string(), work: z.string(), userxattr: z.boolean() }),
      atPause: z.boolean(),
      atExit: z.boolean(),
    })
    .optional(),
  /** See ContainerRequest. */
  resolvConf: z.string().optional(),
};

const slotName = z.custom<SlotName>((value) => typeof value === 'string' && /^r[ow]\d+$/.test(value));

const slots = z.array(
  z.object({ slot: slotName, serial: z.string(), file: z.string(), device: z.boolean().optional() }),
);

const aloneRecord = z.object({
  place: z.literal('alone'),
  ...common,
  ...ofVm,
  ...ofFiles,
  /** Of the host's devices that it has. */
  devices: slots.optional(),
});
const podRecord = z.object({
  place: z.literal('pod'),
  ...common,
  ...ofVm,
  /** Its start was asked for. Of a container the guest knows whether its program was started. */
  started: z.boolean(),
  /** Where the files are that its containers get in /etc. */
  filesDirectory: z.string().optional(),
});
const memberRecord = z.object({
  place: z.literal('member'),
  ...common,
  ...ofFiles,
  /** The directory of the container that stands for its pod. */
  pod: z.string(),
  slots,
  /** The guest's numbers of its volumes. */
  volumeNumbers: z.array(z.int().nonnegative()),
});

const containerRecord = z.discriminatedUnion('place', [aloneRecord, podRecord, memberRecord]);

/** Of a container that has a VM to itself. */
export type AloneRecord = z.infer<typeof aloneRecord>;
/** Of what stands for a pod, and has its VM. */
export type PodRecord = z.infer<typeof podRecord>;
/** Of a container that runs in a pod's VM. */
export type MemberRecord = z.infer<typeof memberRecord>;
export type ContainerRecord = z.infer<typeof containerRecord>;

const fileName = 'container.json';

export function writeContainerRecord(directory: string, record: ContainerRecord): void {
  replaceFile(path.join(directory, fileName), JSON.stringify(record));
}

/**
 * The record in a container's directory; undefined when there is none.
 *
 * @throws KilnError invalid-argument for a file that is no record, or of another version
 */
export function readContainerRecord(directory: string): ContainerRecord | undefined {
  const file = path.join(directory, fileName);
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  try {
    return containerRecord.parse(JSON.parse(text));
  } catch (cause) {
    throw new KilnError('invalid-argument', `${file} is not a record of a container`, { cause });
  }
}

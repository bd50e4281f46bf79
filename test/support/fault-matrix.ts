/**
 * The matrix of faults: which part fails, how, and in which phase of a container's life. test/e2e/faults*.test.ts runs its
 * cases, scripts/faults-page makes docs/faults.md of what they saw, and a unit test compares the page with this list.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';

export const parts = ['kilnd', 'QEMU', 'vhost-device-vsock', 'agent', 'crun', 'containerd'] as const;
export type Part = (typeof parts)[number];

export const faults = ['SIGKILL', 'SIGSTOP', 'disk full'] as const;
export type Fault = (typeof faults)[number];

/** How long SIGSTOP lasts. Longer than containerd waits for a State (2 s). */
export const stopMs = 10_000;

export const phases = ['Create', 'Start', 'running idle', 'running with output', 'Delete'] as const;
export type Phase = (typeof phases)[number];

/** What a user saw of one fault. */
export interface FaultRow {
  readonly part: Part;
  readonly fault: Fault;
  readonly phase: Phase;
  readonly saw: string;
  /** The exit code of the user's `ctr`, where it ended. */
  readonly code?: number;
  /** Seconds from the fault to the answer, and what the test allows. */
  readonly seconds: number;
  readonly withinSeconds: number;
}

/** A cell without a case of its own: tested with another one, or without a meaning. */
export interface FaultNote {
  readonly part: Part;
  readonly fault: Fault;
  readonly phases: readonly Phase[];
  readonly why: string;
}

/** A phase in which crun can be neither killed nor stopped. */
function withoutCrun(phase: Phase, why: string): FaultNote[] {
  return (['SIGKILL', 'SIGSTOP'] as const).map((fault) => ({ part: 'crun', fault, phases: [phase], why }));
}

export const faultNotes: readonly FaultNote[] = [
  ...withoutCrun('Start', 'no crun: the agent itself lets the container’s init go on'),
  ...withoutCrun(
    'Delete',
    'no crun: a container that is alone in its guest is not deleted there, since the guest ends',
  ),
  ...withoutCrun(
    'running with output',
    'as running idle: crun is there only while something is exec’d, and has no part in the output',
  ),
  {
    part: 'vhost-device-vsock',
    fault: 'disk full',
    phases,
    why: 'as QEMU: it writes only its log, into the same folder of state',
  },
  {
    part: 'crun',
    fault: 'disk full',
    phases,
    why: 'as the agent: both write only into /run of the guest',
  },
  {
    part: 'agent',
    fault: 'disk full',
    phases: ['Create', 'Start', 'Delete'],
    why: 'no meaning: /run of the guest is memory, and empty in a virtual machine that holds one container',
  },
  {
    part: 'agent',
    fault: 'disk full',
    phases: ['running with output'],
    why: 'as running idle: output is not written to a disk of the guest',
  },
];

/** The name of a case, which is also how docs/faults.md is searched for it. */
export function cellName({ part, fault, phase }: { part: Part; fault: Fault; phase: Phase }): string {
  return `${part}, ${fault}, ${phase}`;
}

/** Every cell that has a case of its own. */
export function testedCells(): { part: Part; fault: Fault; phase: Phase }[] {
  const noted = new Set(
    faultNotes.flatMap((note) => note.phases.map((phase) => cellName({ part: note.part, fault: note.fault, phase }))),
  );
  return parts
    .flatMap((part) => faults.flatMap((fault) => phases.map((phase) => ({ part, fault, phase }))))
    .filter((cell) => !noted.has(cellName(cell)));
}

/** How fast running containers answer again after kilnd was killed, in ms. */
export interface TakeoverFigures {
  readonly containers: number;
  readonly medianMs: number;
  readonly maxMs: number;
}

export interface FaultReport {
  readonly rows: readonly FaultRow[];
  readonly takeover?: TakeoverFigures;
}

/** Adds what a run has seen to the file that KILN_FAULT_REPORT names, if it does; the same cell's earlier row goes. */
export function report({ rows, takeover }: FaultReport): void {
  const file = process.env.KILN_FAULT_REPORT;
  if (file === undefined) return;
  const earlier = readReport(file);
  const names = new Set(rows.map(cellName));
  const figures = takeover ?? earlier.takeover;
  const merged: FaultReport = {
    rows: [...earlier.rows.filter((row) => !names.has(cellName(row))), ...rows],
    ...(figures === undefined ? {} : { takeover: figures }),
  };
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, `${JSON.stringify(merged, null, 1)}\n`);
}

/** An empty one where the file is not there yet. */
export function readReport(file: string): FaultReport {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    return { rows: [] };
  }
  return JSON.parse(text) as FaultReport;
}

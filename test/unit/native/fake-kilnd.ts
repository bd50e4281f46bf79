/** A kilnd without containers, for the launcher's tests: the real control server, and a handler that tells what it got. */
import { mkdirSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { Readiness } from '../../../src/shim/control/readiness.ts';
import type { ControlReply, ControlRequest } from '../../../src/shim/control/request.ts';
import { ControlServer } from '../../../src/shim/control/server.ts';

/** What the launcher has made of this process; the reply to `status`. */
export interface Circumstances {
  readonly pid: number;
  readonly parent: number;
  readonly session: number;
  readonly environment: readonly string[];
  readonly descriptors: Readonly<Record<string, string>>;
  readonly cwd: string;
  readonly oomScoreAdj: string;
  readonly umask: number;
  readonly signals: { readonly blocked: string; readonly ignored: string };
}

/**
 * @param mode `ready`: serve. `stopping-once`: the first kilnd of the state folder ends without an answer, the next one
 * serves. `stopping-always`: every one ends without an answer, after a word on stderr. `beaten`: one serves, but the
 * launcher is told of an error, as if it had started another, too late.
 */
export async function main(mode: string): Promise<void> {
  const circumstances = look(); // before anything else opens a descriptor
  const stateDir = process.env.KILN_STATE_DIR;
  if (stateDir === undefined) throw new Error('KILN_STATE_DIR is not set');
  const pids = path.join(stateDir, 'pids');
  mkdirSync(pids, { recursive: true });
  const isFirst = readdirSync(pids).length === 0;
  writeFileSync(path.join(pids, String(process.pid)), '');
  const ends = mode === 'stopping-always' || (mode === 'stopping-once' && isFirst);

  const readiness = Readiness.take(process.env);
  const server = await ControlServer.listen(stateDir, async (request): Promise<ControlReply> => {
    if (ends) {
      void server.close(); // unlinks the socket, as a kilnd that stops does first
      process.stderr.write('the fake kilnd stops\n');
      process.exit(0);
    }
    if (request.kind === 'stop') setImmediate(() => void server.close());
    return { exitCode: 0, stdout: Buffer.from(describe(request, circumstances)) };
  });
  if (mode === 'beaten') readiness.failed(new Error('another kilnd was first'));
  else readiness.ready();
}

function describe(request: ControlRequest, circumstances: Circumstances): string {
  return request.kind === 'status' ? JSON.stringify(circumstances) : `kilnd ${process.pid} ${request.kind}`;
}

function look(): Circumstances {
  const status = new Map(
    readFileSync('/proc/self/status', 'utf8')
      .split('\n')
      .map((line) => line.split(':\t') as [string, string]),
  );
  // After the parenthesised name: state, ppid, pgrp, session, proc_pid_stat(5).
  const stat = readFileSync('/proc/self/stat', 'utf8')
    .replace(/^.*\) /, '')
    .split(' ');
  const descriptors: Record<string, string> = {};
  for (const fd of readdirSync('/proc/self/fd')) {
    try {
      descriptors[fd] = readlinkSync(`/proc/self/fd/${fd}`);
    } catch {
      // The one that listed the folder.
    }
  }
  return {
    pid: process.pid,
    parent: process.ppid,
    session: Number(stat[3]),
    environment: readFileSync('/proc/self/environ', 'utf8').split('\0').filter(Boolean),
    descriptors,
    cwd: process.cwd(),
    oomScoreAdj: readFileSync('/proc/self/oom_score_adj', 'utf8').trim(),
    umask: process.umask(),
    signals: { blocked: status.get('SigBlk') ?? '', ignored: status.get('SigIgn') ?? '' },
  };
}

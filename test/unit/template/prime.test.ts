import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { AgentService } from '../../../gen/kiln/agent/v1/agent.ts';
import { Guest } from '../../../src/guest/guest.ts';
import { prime } from '../../../src/template/prime.ts';
import type { SlotName } from '../../../src/vmm/vmm.ts';
import { endWithStdin, failure, type Script, ScriptedAgent, socketPair } from '../guest/scripted-agent.ts';

let directory: string;
let guest: Guest | undefined;
beforeEach(() => {
  directory = mkdtempSync(path.join(tmpdir(), 'kiln-prime-'));
});
afterEach(() => {
  guest?.[Symbol.dispose]();
  rmSync(directory, { recursive: true });
});

const never = new AbortController().signal;
const blank = () => path.join(directory, 'prime.ext4');

/** A guest whose programs end when their stdin does, and what is done to its VM. */
async function connect(script: Script = {}) {
  const agent: ScriptedAgent = new ScriptedAgent({
    ...endWithStdin(() => agent),
    ...script,
  });
  const [ours, theirs] = await socketPair();
  agent.serve(theirs);
  guest = await Guest.connect(ours, { hostname: '', session: '', becomesTemplate: true, answerLimitMs: 5000 });
  const disks: string[] = [];
  const vm = {
    attachDisk: async (slot: SlotName, file: string) => {
      disks.push(`${slot}: ${file}${existsSync(file) ? ', which is there' : ''}`);
      return `serial of ${slot}`;
    },
    detachDisk: async (slot: SlotName) => {
      disks.push(`no ${slot}`);
    },
  };
  const makeBlank = (file: string) => writeFile(file, '');
  return { agent, disks, options: { guest, vm, directory, makeBlank } };
}

test('a template is primed by calls of every kind', async () => {
  const { agent, options } = await connect();
  await prime(options, never);
  const ofIdentity = ['adjustClock', 'sampleRandomness'];
  // What they make would stay in every clone.
  const ofPods = ['preparePod', 'listContainers'];
  // For which the start of most containers does not wait.
  const ofNetworks = ['setNetwork', 'dial', 'serveNameservers', 'relayQueries'];
  const others = [...ofNetworks, 'findDisks', 'readProcesses', 'readFiles', 'writeFiles'];
  const all = Object.keys(AgentService).filter((name) => ![...ofIdentity, ...ofPods, ...others].includes(name));
  expect([...new Set(agent.calls)].sort()).toEqual(all.sort());
});

test('its containers have a disk, as others have it, which is gone afterwards', async () => {
  const sources: string[][] = [];
  const { disks, options } = await connect({
    createContainer: ({ request }, done) => {
      sources.push(request.mounts.map(({ source, type }) => `${type} ${source?.value}`));
      done(null, { pid: 7 });
    },
  });
  await prime(options, never);
  expect(disks).toEqual([`rw0: ${blank()}, which is there`, 'no rw0']);
  const root = ['ext4 serial of rw0', 'overlay overlay'];
  expect(sources).toEqual([root, root, root, root]);
  expect(existsSync(blank())).toBe(false);
});

test('a call that the guest refuses is told, and the disk is gone', async () => {
  const { options } = await connect({
    pauseContainer: (_call, done) => done(failure('INTERNAL', 'no freezer')),
  });
  await expect(prime(options, never)).rejects.toThrow('no freezer');
  expect(existsSync(blank())).toBe(false);
});

test('a disk that cannot be made is told', async () => {
  const { options } = await connect();
  const makeBlank = () => Promise.reject(new Error('no space'));
  await expect(prime({ ...options, makeBlank }, never)).rejects.toThrow('no space');
});

import { afterEach, expect, test } from 'vitest';
import { AgentService } from '../../../gen/kiln/agent/v1/agent.ts';
import { Guest } from '../../../src/guest/guest.ts';
import { prime } from '../../../src/template/prime.ts';
import { endWithStdin, failure, type Script, ScriptedAgent, socketPair } from '../guest/scripted-agent.ts';

let guest: Guest | undefined;
afterEach(() => guest?.[Symbol.dispose]());

/** A guest whose programs end when their stdin does. */
async function connect(script: Script = {}) {
  const agent: ScriptedAgent = new ScriptedAgent({
    writeStdin: endWithStdin(() => agent),
    ...script,
  });
  const [ours, theirs] = await socketPair();
  agent.serve(theirs);
  guest = await Guest.connect(ours, { hostname: '', session: '', becomesTemplate: true, answerLimitMs: 5000 });
  return { agent, guest };
}

test('a template is primed by calls of every kind', async () => {
  const { agent, guest } = await connect();
  await prime(guest);
  const ofIdentity = ['adjustClock', 'sampleRandomness'];
  // What they make would stay in every clone.
  const ofPods = ['preparePod', 'listContainers'];
  // For which the start of most containers does not wait.
  const ofNetworks = ['setNetwork', 'watchListeners', 'dial', 'serveNameservers', 'relayQueries'];
  const others = [...ofNetworks, 'findDisks', 'readProcesses', 'readFiles', 'writeFiles'];
  const all = Object.keys(AgentService).filter((name) => ![...ofIdentity, ...ofPods, ...others].includes(name));
  expect([...new Set(agent.calls)].sort()).toEqual(all.sort());
});

test('a call that the guest refuses is told', async () => {
  const { guest } = await connect({
    pauseContainer: (_call, done) => done(failure('INTERNAL', 'no freezer')),
  });
  await expect(prime(guest)).rejects.toThrow('no freezer');
});

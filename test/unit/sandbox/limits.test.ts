import { afterEach, describe, expect, it, vi } from 'vitest';
import { failure, outputOf } from '../guest/scripted-agent.ts';
import { canMakeNetns, isAlive, Workbench } from './workbench.ts';

// What is tried here is that somebody gives up. How long that takes is not the question.
vi.mock('../../../src/sandbox/limits.ts', () => ({
  outputGraceMs: 30,
  deleteDrainMs: 60,
  destroyGraceMs: 60,
  guestStopGraceMs: 60,
  killLimitMs: 60,
  consoleLimitMs: 30,
}));

const benches: Workbench[] = [];
function bench(...args: ConstructorParameters<typeof Workbench>): Workbench {
  const made = new Workbench(...args);
  benches.push(made);
  return made;
}
afterEach(async () => {
  for (const made of benches.splice(0)) await made[Symbol.asyncDispose]();
});

describe.skipIf(!canMakeNetns)('patience has an end', () => {
  it('with a reader that stalls: the exit is told, the guest flushed at Delete, and all released', async () => {
    const made = bench({
      readOutput: (call) => {
        call.write(outputOf('unread'));
        call.resume();
        void made.agent.exited().then(() => call.end());
      },
    });
    made.stdio.stalled = true;
    const container = await made.create();
    await container.start();
    made.agent.exit(5);
    expect((await container.exit.wait()).status).toBe(5);
    expect(isAlive(container.pid)).toBe(false);
    expect(made.agent.calls).not.toContain('removeContainer');
    expect((await container.delete()).status).toBe(5);
    expect(made.agent.calls).toContain('removeContainer');
    expect(made.events).toEqual(['stdin started', 'vm killed', 'rootfs released']);
    expect(made.clean).toBe(true);
  });

  it('with an agent that does not kill: destroy ends the VM', async () => {
    const made = bench({ signalProcess: () => {} });
    const container = await made.create();
    await container.start();
    await container.destroy();
    expect(container.exit.peek()?.status).toBe(137);
    expect(made.clean).toBe(true);
    expect(made.logged('error')).toEqual([]);
  });

  it('with an agent that does not remove: destroy ends the VM, and the log tells what may be lost', async () => {
    const made = bench({ removeContainer: () => {} });
    const container = await made.create();
    await container.start();
    await container.destroy();
    expect(made.clean).toBe(true);
    expect(made.logged('warn')).toContainEqual(expect.stringContaining('its last writes may be lost'));
  });

  it('with an agent that does not kill what was only created: Delete ends the VM', async () => {
    const made = bench({ signalProcess: () => {} });
    made.bootTimeoutS = 0.5;
    const container = await made.create();
    expect((await container.delete()).status).toBe(137);
    expect(made.clean).toBe(true);
    expect(made.logged('warn')).toContainEqual(expect.stringContaining('cannot kill the container'));
  });

  it('with an agent that does not answer SIGKILL: it ends the VM', async () => {
    const made = bench({ signalProcess: () => {} });
    made.bootTimeoutS = 0.5;
    const container = await made.create();
    await container.start();
    await container.kill(9, false);
    expect(container.exit.peek()?.status).toBe(137);
    expect(made.events).toContain('vm killed');
  });

  it('with an agent that does not answer another signal: it is the caller who decides', async () => {
    const made = bench({ signalProcess: () => {} });
    made.bootTimeoutS = 0.5;
    const container = await made.create();
    await container.start();
    await expect(container.kill(15, false)).rejects.toThrow('did not answer SignalProcess within 0.5 s');
    expect(container.state).toEqual({ kind: 'running' });
  });

  it('with an agent that says it has killed, and has not: the VM is ended', async () => {
    const made = bench({ signalProcess: (_call, done) => done(null, {}) });
    const container = await made.create();
    await container.start();
    await container.kill(9, true);
    expect((await container.exit.wait()).status).toBe(137);
    expect(made.events).toContain('vm killed');
    expect(made.logged('warn')).toEqual([
      'cannot kill the container, so its VM is ended: the guest did not end container c1 within 0.06 s of SIGKILL',
    ]);
  });

  it('with an agent that calls itself unavailable and keeps its connection: the VM is ended', async () => {
    const made = bench({ signalProcess: (_call, done) => done(failure('UNAVAILABLE', 'not lost at all')) });
    const container = await made.create();
    await container.start();
    await expect(container.kill(15, false)).rejects.toThrow('container c1: process already finished');
    expect(made.events).toContain('vm killed');
  });

  it('with an agent that never answers a Start', async () => {
    const made = bench({ startContainer: () => {} });
    made.bootTimeoutS = 0.5;
    const container = await made.create();
    await expect(container.start()).rejects.toThrow('did not answer StartContainer within 0.5 s');
    await container.kill(9, true);
    expect((await container.delete()).status).toBe(137);
  });

  it('with a VM that lives on without its agent: it is killed, and nobody knows how the program ended', async () => {
    const made = bench();
    const container = await made.create();
    await container.start();
    made.agent.disconnect();
    expect((await container.exit.wait()).status).toBe(255);
    expect(made.events).toContain('vm killed');
    expect(made.logged('error')).toContainEqual(expect.stringContaining('the VM ended while the container was alive'));
    await container.delete();
    expect(made.clean).toBe(true);
  });

  it('with a VMM that does not even tell the console', async () => {
    const made = bench({ createContainer: () => {} });
    made.bootTimeoutS = 0.3;
    made.vmHooks.consoleTail = () => new Promise(() => {});
    await expect(made.create()).rejects.toThrow("the guest console's last lines:\n(nothing)");
    expect(made.clean).toBe(true);
  });

  it('with an agent that is lost while it makes the container', async () => {
    const made = bench({ createContainer: () => made.agent.disconnect() });
    await expect(made.create()).rejects.toThrow('the connection to the guest was lost while container c1 was created');
    expect(made.clean).toBe(true);
  });
});

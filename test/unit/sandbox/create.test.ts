import { existsSync, readFileSync } from 'node:fs';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { CreateContainerRequest } from '../../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../../../src/errors.ts';
import { readContainerRecord } from '../../../src/sandbox/record.ts';
import { failure, type Script } from '../guest/scripted-agent.ts';
import { canMakeNetns, isAlive, Workbench } from './workbench.ts';

const benches: Workbench[] = [];
function bench(script: Script = {}): Workbench {
  const made = new Workbench(script);
  benches.push(made);
  return made;
}
afterEach(async () => {
  for (const made of benches.splice(0)) await made[Symbol.asyncDispose]();
});

async function failureOf(promise: Promise<unknown>): Promise<KilnError> {
  const error: unknown = await promise.then(
    () => new Error('it succeeded'),
    (thrown: unknown) => thrown,
  );
  return KilnError.from(error);
}

/** Waits for the signal, as a long step does. */
function untilAborted(signal: AbortSignal): Promise<never> {
  return new Promise((_resolve, reject) => {
    if (signal.aborted) reject(signal.reason);
    signal.addEventListener('abort', () => reject(signal.reason));
  });
}

/** The directory gone, the VM ended, the root filesystem given back. */
function expectNothingLeft(made: Workbench): void {
  expect(existsSync(made.directory)).toBe(false);
  if (made.vm !== undefined) expect(made.events).toContain('vm killed');
}

describe.skipIf(!canMakeNetns)('a Create that fails', () => {
  it("because one step does gives the others up, and has that step's error", async () => {
    const made = bench();
    made.vmHooks.acceptAgent = untilAborted;
    made.prepareRootfs = async () => {
      throw new KilnError('resource-exhausted', 'no space left for the image');
    };
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual(['resource-exhausted', 'no space left for the image']);
    expectNothingLeft(made);
    expect(made.events).not.toContain('rootfs released');
  });

  it('because the VM does not boot gives the root filesystem back', async () => {
    const made = bench();
    made.vmHooks.acceptAgent = async () => {
      throw new KilnError('unavailable', 'QEMU ended before the agent called');
    };
    expect((await failureOf(made.create())).message).toBe('QEMU ended before the agent called');
    expectNothingLeft(made);
    expect(made.events).toContain('rootfs released');
  });

  it('because the stand-in does not start ends the VM', async () => {
    const made = bench();
    made.standIn = 'echo "error: cannot make a network namespace" >&3; exit 1';
    const error = await failureOf(made.create());
    expect(error.message).toContain('cannot make a network namespace');
    expectNothingLeft(made);
  });

  it("because the guest refuses the container has the guest's words", async () => {
    const made = bench({
      createContainer: (_call, done) => done(failure('INVALID_ARGUMENT', 'exec: "nope": not found')),
    });
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual(['invalid-argument', 'exec: "nope": not found']);
    expectNothingLeft(made);
    expect(made.events).toEqual(['vm killed', 'rootfs released']);
  });

  it('because guest and host speak different protocols names the remedy', async () => {
    const made = bench({ hello: (_call, done) => done(failure('FAILED_PRECONDITION', 'protocol 1, protocol 2')) });
    const error = await failureOf(made.create());
    expect(error.userMessage).toBe('protocol 1, protocol 2 (build the guest image again with `npm run setup`)');
    expectNothingLeft(made);
  });

  it('because the VM ended while the container was made says how, with its console', async () => {
    const made = bench({
      createContainer: () => made.vm?.end({ code: 0, guestStopped: true, consoleTail: 'Kernel panic - not syncing' }),
    });
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual([
      'unavailable',
      'the guest stopped while container c1 was created\nKernel panic - not syncing',
    ]);
  });

  it('because the VM ended while a disk was attached says how, and not only what the VMM did not answer', async () => {
    const made = bench();
    made.vmHooks.attachDisk = async () => {
      made.vm?.end({ signal: 'SIGKILL' });
      throw new KilnError('unavailable', 'the VMM has closed its control connection');
    };
    const error = await failureOf(made.create());
    expect(error.code).toBe('unavailable');
    expect(error.message).toMatch(/^the VM ended \(SIGKILL\) while .* was attached$/);
    expect(made.events).toEqual(['rootfs released']);
  });

  it('because one disk could not be attached does not leave the VM while it is at the other', async () => {
    const made = bench();
    let asked = 0;
    const other = Promise.withResolvers<void>();
    made.vmHooks.attachDisk = () => {
      asked += 1;
      return asked === 1 ? Promise.reject(new KilnError('internal', 'no lock')) : other.promise;
    };
    const failed = failureOf(made.create());
    await vi.waitFor(() => expect(asked).toBe(2), { interval: 1 });
    await new Promise((resolve) => setImmediate(resolve));
    expect(made.events).toEqual([]);
    other.resolve();
    expect((await failed).message).toBe('no lock');
    expect(made.events).toEqual(['vm killed', 'rootfs released']);
    expectNothingLeft(made);
  });

  it('and a clean-up that fails too are both told, under the code of the first', async () => {
    const made = bench({ createContainer: (_call, done) => done(failure('INVALID_ARGUMENT', 'bad spec')) });
    made.releaseRootfs = async () => {
      throw new Error('EBUSY: rw.ext4');
    };
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual(['invalid-argument', 'bad spec; and then: EBUSY: rw.ext4']);
    expectNothingLeft(made);
  });

  it('leaves its network also when something of the VM cannot be released', async () => {
    const made = bench({ createContainer: (_call, done) => done(failure('INVALID_ARGUMENT', 'bad spec')) });
    made.vmHooks.kill = () => Promise.reject(new Error('EBUSY: jail'));
    expect((await failureOf(made.create())).message).toContain('bad spec; and then: EBUSY: jail');
    expect(made.networksLeft).toBe(1);
  });
});

describe.skipIf(!canMakeNetns)('a step that never ends', () => {
  it("of the VMM's start is ended in time", async () => {
    const made = bench();
    made.bootTimeoutS = 0.05;
    made.beforeBoot = untilAborted;
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual(['deadline-exceeded', 'scripted did not start within 0.05 s']);
    expectNothingLeft(made);
  });

  it("of the guest's boot is ended in time, with the guest's console", async () => {
    const made = bench();
    made.bootTimeoutS = 0.05;
    made.vmHooks.acceptAgent = untilAborted;
    const error = await failureOf(made.create());
    expect(error.code).toBe('deadline-exceeded');
    expect(error.message).toContain('did not call within 0.05 s');
    expect(error.message).toContain('last words of the guest');
    expect(error.hint).toContain('vm.boot_timeout_s');
    expectNothingLeft(made);
  });

  it('of an agent that calls and is silent then is ended in time', async () => {
    const made = bench({ hello: () => {} });
    made.bootTimeoutS = 0.05;
    const error = await failureOf(made.create());
    expect(error.code).toBe('deadline-exceeded');
    expectNothingLeft(made);
  });

  it("of the agent in CreateContainer is ended in time, with the guest's console", async () => {
    const made = bench({ createContainer: () => {} });
    made.bootTimeoutS = 0.3;
    const error = await failureOf(made.create());
    expect(error.code).toBe('deadline-exceeded');
    expect(error.message).toBe(
      "the agent in the guest did not answer CreateContainer within 0.3 s; the guest console's last lines:\nlast words of the guest",
    );
    expectNothingLeft(made);
    expect(made.events).toEqual(['vm killed', 'rootfs released']);
  });

  it('of the VMM, which does not attach a disk, is ended in time', async () => {
    const made = bench();
    made.bootTimeoutS = 0.3;
    made.vmHooks.attachDisk = () => new Promise(() => {});
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual([
      'deadline-exceeded',
      'VMM did not attach /cache/lower.erofs within 0.3 s',
    ]);
    expectNothingLeft(made);
  });
});

describe.skipIf(!canMakeNetns)('a Create that is given up', () => {
  const reason = new KilnError('canceled', 'deleted meanwhile');

  /** Each makes Create stand still at one step, and says when it does. */
  const steps: Record<string, (stand: (signal?: AbortSignal) => Promise<never>) => Workbench> = {
    'the root filesystem is prepared': (stand) => Object.assign(bench(), { prepareRootfs: stand }),
    'the VMM starts': (stand) => Object.assign(bench(), { beforeBoot: stand }),
    'the guest boots': (stand) => Object.assign(bench(), { vmHooks: { acceptAgent: stand } }),
    'a disk is attached': (stand) => Object.assign(bench(), { vmHooks: { attachDisk: () => stand() } }),
    'the agent says Hello': (stand) => bench({ hello: () => void stand() }),
    'the agent makes the container': (stand) => bench({ createContainer: () => void stand() }),
  };

  it.each(Object.keys(steps))('while %s rejects with the reason and leaves nothing', async (step) => {
    const abort = new AbortController();
    const there = Promise.withResolvers<void>();
    const made = steps[step]!((signal) => {
      there.resolve();
      return signal === undefined ? new Promise<never>(() => {}) : untilAborted(signal);
    });
    const create = made.create(abort.signal);
    const outcome = create.catch((error: unknown) => error);
    await there.promise;
    abort.abort(reason);
    expect(await outcome).toBe(reason);
    expectNothingLeft(made);
  });

  it('before it began does nothing that stays', async () => {
    const made = bench();
    await expect(made.create(AbortSignal.abort(reason))).rejects.toBe(reason);
    expectNothingLeft(made);
  });
});

it.skipIf(!canMakeNetns)('the stand-in of a Create that fails is gone with it', async () => {
  const made = bench({ createContainer: (_call, done) => done(failure('INTERNAL', 'no')) });
  made.standIn = `echo $$ > ${made.root}/pid; ${made.standIn}`;
  await failureOf(made.create());
  expect(isAlive(Number(readFileSync(`${made.root}/pid`, 'utf8')))).toBe(false);
});

describe.skipIf(!canMakeNetns)('a VM from a template', () => {
  const marksOf = (made: Workbench) => made.timeline.toJSON().marks.map(({ name }) => name);

  it('is restored and not booted', async () => {
    const made = bench();
    made.beforeBoot = () => Promise.reject(new Error('it boots'));
    made.useTemplate();
    await made.create();
    expect(made.events).toEqual(['restored b007']);
    expect(marksOf(made)).toContain('vm-restored');
    expect(marksOf(made)).not.toContain('kernel-up');
    expect(made.clocksKept).toHaveLength(1);
  });

  it('boots when it cannot be restored', async () => {
    const made = bench();
    made.useTemplate(() => Promise.reject(new KilnError('internal', 'QEMU ended at the restore of its state')));
    await made.create();
    expect(made.events).toEqual(['not restored: QEMU ended at the restore of its state']);
    expect(marksOf(made)).toContain('kernel-up');
  });

  it('boots when its agent does not answer, and the clone is ended first', async () => {
    const made = bench();
    made.useTemplate();
    made.vmHooks.acceptAgent = async () => {
      delete made.vmHooks.acceptAgent;
      throw new KilnError('unavailable', 'the guest stopped before the agent called');
    };
    await made.create();
    expect(made.events).toEqual(['vm killed', 'not restored: the guest stopped before the agent called']);
  });

  it('is given up, and not booted, when nobody wants the container any more', async () => {
    const made = bench();
    const giveUp = new AbortController();
    made.useTemplate(async () => giveUp.abort(new Error('enough')));
    made.beforeBoot = () => Promise.reject(new Error('it boots'));
    expect((await failureOf(made.create(giveUp.signal))).message).toBe('enough');
    expectNothingLeft(made);
    expect(made.events.filter((event) => event.startsWith('not restored'))).toEqual([]);
  });
});

describe.skipIf(!canMakeNetns)('a Create of a container with a block device', () => {
  it('puts it behind a drive slot, and names it in the guest as the guest does', async () => {
    let request: CreateContainerRequest | undefined;
    const made = bench({
      findDisks: (_call, done) => done(null, { devices: [{ major: 254, minor: 48 }] }),
      createContainer: (call, done) => {
        request = call.request;
        done(null, { pid: 12 });
      },
    });
    made.blockDevices = {
      devices: [{ file: '/dev/disk', bytes: 4096, readOnly: true }],
      filesystems: [{ device: 0, target: '/t', type: 'ext4', options: ['ro'] }],
    };
    const container = await made.create();
    const [slot = ''] = made.vm?.disks.find(([, file]) => file === '/dev/disk') ?? [];
    expect(slot).toMatch(/^ro/);
    expect(request?.disks).toEqual([slot]);
    expect(request?.mounts.at(-1)).toEqual({
      source: { $case: 'disk', value: slot },
      target: '/t',
      type: 'ext4',
      options: ['ro'],
      directories: [],
    });
    expect(JSON.parse(String(request?.spec))).toMatchObject({ devices: [{ major: 254, minor: 48 }] });
    expect(readContainerRecord(made.directory)).toMatchObject({
      devices: [{ slot, serial: slot, file: '/dev/disk', device: true }],
    });
    await container.destroy();
  });

  it('fails, and leaves nothing, when the guest does not find it', async () => {
    const made = bench({ findDisks: (_call, done) => done(failure('INTERNAL', 'no disk with serial "ro1"')) });
    made.blockDevices = { devices: [{ file: '/dev/disk', bytes: 4096, readOnly: true }], filesystems: [] };
    expect((await failureOf(made.create())).message).toBe('no disk with serial "ro1"');
    expectNothingLeft(made);
  });
});

import { existsSync, writeFileSync } from 'node:fs';
import { constants } from 'node:os';
import { join } from 'node:path';
import { status } from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  type AgentClient,
  type Mount,
  OutputStream,
  type ReadOutputResponse,
} from '../../../gen/kiln/agent/v1/agent.ts';
import { kilnVersion } from '../../../src/version.ts';
import {
  create,
  hello,
  list,
  OutputReader,
  read,
  remove,
  signal,
  start,
  TestAgent,
  unary,
  wait,
  write,
} from './agent.ts';

describe('a new connection', () => {
  let agent: TestAgent;
  let client: AgentClient;
  beforeAll(async () => {
    agent = new TestAgent();
    client = await agent.accept();
  });
  afterAll(() => agent[Symbol.asyncDispose]());

  it('refuses every call before Hello', async () => {
    const refused = { code: status.FAILED_PRECONDITION, details: 'the first call on a connection must be Hello' };
    await expect(start(client, 'a')).rejects.toMatchObject(refused);
    await expect(read(client, 'a')).rejects.toMatchObject(refused);
    await expect(write(client, 'a', 'x')).rejects.toMatchObject(refused);
  });

  it('refuses a host of another protocol, and names both numbers', async () => {
    const other = hello(client, { protocol: 7 as never, kilnVersion: '9.9' });
    await expect(other).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: expect.stringMatching(/Kiln 9\.9 .* protocol 7.*protocol 1/),
    });
    await expect(start(client, 'a')).rejects.toMatchObject({ code: status.FAILED_PRECONDITION });
  });

  it('tells the host what it needs to know', async () => {
    const response = await hello(client);
    expect(response).toMatchObject({ protocol: 1, kilnVersion });
    expect(response.kernelRelease).toMatch(/^\d+\./);
    expect(response.bootId).toMatch(/^[0-9a-f-]{36}$/);
    expect(response.answeredNs).toBeGreaterThan(response.agentStartedNs);
    expect(response.memoryBytes).toBeGreaterThan(1n << 20n);
    expect(response.vcpus).toBeGreaterThan(0);
  });

  it('comes again after the old one has broken, and the containers are still there', async () => {
    await hello(client);
    await create(client, 'survivor', 'echo still here; exit 4');
    const next = agent.accept();
    agent.disconnect();
    client = await next;
    await hello(client);
    await start(client, 'survivor');
    expect(await wait(client, 'survivor')).toMatchObject({ exitStatus: 4 });
    expect((await read(client, 'survivor')).toString()).toBe('still here\n');
    await remove(client, 'survivor');
  });
});

describe('a container', () => {
  let agent: TestAgent;
  let client: AgentClient;
  beforeAll(async () => {
    agent = new TestAgent();
    client = await agent.accept();
    await hello(client);
  });
  afterAll(() => agent[Symbol.asyncDispose]());

  it('goes from create to remove, and leaves nothing', async () => {
    const pid = await create(client, 'a', 'cat; echo problem >&2; exit 42');
    expect(pid).toBeGreaterThan(1);
    await start(client, 'a');
    const exit = wait(client, 'a');
    const stdout = read(client, 'a');
    const stderr = read(client, 'a', 'stderr');
    await write(client, 'a', 'one ', 'two');
    const before = BigInt(Date.now() - 60_000) * 1_000_000n;
    const { exitStatus, exitedAtNs } = await exit;
    expect(exitStatus).toBe(42);
    expect(exitedAtNs).toBeGreaterThan(before);
    expect((await stdout).toString()).toBe('one two');
    expect((await stderr).toString()).toBe('problem\n');
    await remove(client, 'a');
    expect(agent.leftovers()).toEqual([]);
    await expect(wait(client, 'a')).rejects.toMatchObject({ code: status.NOT_FOUND });
  });

  it('that does not exist is NOT_FOUND for every verb, with its name', async () => {
    const missing = { code: status.NOT_FOUND, details: 'no container "ghost" in this guest' };
    await expect(start(client, 'ghost')).rejects.toMatchObject(missing);
    await expect(wait(client, 'ghost')).rejects.toMatchObject(missing);
    await expect(signal(client, 'ghost', 9)).rejects.toMatchObject(missing);
    await expect(remove(client, 'ghost')).rejects.toMatchObject(missing);
    await expect(read(client, 'ghost')).rejects.toMatchObject(missing);
    await expect(write(client, 'ghost', 'x')).rejects.toMatchObject(missing);
    await expect(list(client, 'ghost')).rejects.toMatchObject(missing);
  });

  it('whose program does not exist fails in create with a clear message and leaves nothing', async () => {
    await expect(create(client, 'b', 'nosuch')).rejects.toMatchObject({
      code: status.INVALID_ARGUMENT,
      details: 'exec: "nosuch": executable file not found in $PATH',
    });
    expect(agent.leftovers()).toEqual([]);
    await create(client, 'b', 'exit 0');
    await remove(client, 'b');
  });

  it('whose crun is killed fails in create as internal and leaves nothing', async () => {
    await expect(create(client, 'k', 'killed')).rejects.toMatchObject({
      code: status.INTERNAL,
      details: 'crun create ended with SIGKILL and no message',
    });
    expect(agent.leftovers()).toEqual([]);
  });

  it('whose disk does not exist fails in create and leaves nothing, also not the mount point', async () => {
    const target = join(agent.directory, 'deep/mount/point');
    const mount = { target, type: 'nosuchfs', options: ['ro'], directories: [] };
    const disk: Mount = { ...mount, source: { $case: 'disk', value: 'ro99' } };
    await expect(create(client, 'c', 'exit 0', { mounts: [disk] })).rejects.toMatchObject({
      code: status.INTERNAL,
      details: expect.stringMatching(/^no disk with serial "ro99"(?!.*and then)/),
    });
    const device: Mount = { ...mount, source: { $case: 'device', value: 'none' } };
    await expect(create(client, 'c', 'exit 0', { mounts: [device] })).rejects.toMatchObject({
      code: status.INTERNAL,
      details: expect.stringContaining(`cannot mount nosuchfs none at ${target} (ro): E`),
    });
    expect(existsSync(join(agent.directory, 'deep'))).toBe(false);
    expect(agent.leftovers()).toEqual([]);
  });

  it('joins the processes of no container that is not there, or has ended, and leaves nothing', async () => {
    const joining = (other: string) => ({
      linux: { namespaces: [{ type: 'pid', path: `${agent.directory}/pod/pid-of/${other}` }] },
    });
    await expect(create(client, 'debug', 'exit 0', joining('nobody'))).rejects.toMatchObject({
      code: status.NOT_FOUND,
      details: 'no container "nobody" in this guest',
    });
    await create(client, 'ended', 'exit 0');
    await start(client, 'ended');
    await wait(client, 'ended');
    await expect(create(client, 'debug', 'exit 0', joining('ended'))).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'cannot join the process namespace of container "ended": it is stopped',
    });
    await remove(client, 'ended');
    expect(agent.leftovers()).toEqual([]);
  });

  it('has an id that is free, and that can be a directory', async () => {
    await create(client, 'd', 'exit 0');
    await expect(create(client, 'd', 'exit 0')).rejects.toMatchObject({ code: status.ALREADY_EXISTS });
    await remove(client, 'd');
    for (const id of ['', '..', '../x', 'a/b', 'a b']) {
      await expect(create(client, id, 'exit 0')).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
    }
  });

  it('refuses what its state does not allow, and names the state', async () => {
    await create(client, 'e', 'exec sleep 1000');
    await start(client, 'e');
    await expect(start(client, 'e')).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'cannot start container "e": it is running',
    });
    await expect(remove(client, 'e')).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'cannot remove container "e": it is running',
    });
    for (const number of [65, 999, 2 ** 32 - 1]) {
      const refusal = { code: status.INVALID_ARGUMENT, details: `there is no signal ${number}` };
      await expect(signal(client, 'e', number)).rejects.toMatchObject(refusal);
    }
    await signal(client, 'e', 15);
    expect(await wait(client, 'e')).toMatchObject({ exitStatus: 143 });
    await expect(signal(client, 'e', 15)).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'cannot signal container "e": it is stopped',
    });
    await remove(client, 'e');
  });

  it('without a control group of its own says so to every verb on it', async () => {
    await create(client, 'k', 'exec sleep 1000');
    const stats = () => unary((done) => client.readStats({ id: 'k' }, done));
    const pause = () => unary((done) => client.pauseContainer({ id: 'k' }, done));
    await expect(stats()).rejects.toMatchObject({
      code: status.INTERNAL,
      details: 'cannot read the statistics of container "k": it has no control group of its own',
    });
    await expect(pause()).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'cannot pause container "k": it is created',
    });
    await start(client, 'k');
    await expect(pause()).rejects.toMatchObject({ code: status.INTERNAL });
    await expect(unary((done) => client.resumeContainer({ id: 'k' }, done))).rejects.toMatchObject({
      code: status.INTERNAL,
    });
    const limits = unary((done) => client.setLimits({ id: 'k', files: [] }, done));
    await expect(limits).rejects.toMatchObject({ code: status.INTERNAL });
    await remove(client, 'k', true);
    await expect(stats()).rejects.toMatchObject({ code: status.NOT_FOUND });
  });

  it('is told of by the call that has created it, until it has ended', async () => {
    const spec = Buffer.from(JSON.stringify({ script: 'exit 3' }));
    const stdio = { stdin: false, stdout: false, stderr: false, terminal: false, width: 0, height: 0 };
    const none = { mounts: [], volumes: undefined, network: undefined, disks: [], awaitFiles: false };
    const told = client.createContainer({ id: 'told', spec, stdio, ...none })[Symbol.asyncIterator]();
    expect((await told.next()).value).toMatchObject({ pid: expect.any(Number), process: undefined });
    await start(client, 'told');
    expect((await told.next()).value).toMatchObject({ pid: 0, process: { exitStatus: 3 } });
    expect((await told.next()).done).toBe(true);
    await remove(client, 'told');
  });

  it('is killed by a forced remove, and whoever waits gets 137', async () => {
    await create(client, 'f', 'exec sleep 1000');
    await start(client, 'f');
    const exit = wait(client, 'f');
    await remove(client, 'f', true);
    expect(await exit).toMatchObject({ exitStatus: 137 });
    expect(agent.leftovers()).toEqual([]);
  });

  it.each([
    ['SIGTERM', 143],
    ['SIGINT', 130],
    ['SIGSYS', 159],
  ] as const)('ends by %s before its start, though its init is deaf to it', async (name, exitStatus) => {
    await create(client, 'p', 'exit 0');
    await signal(client, 'p', constants.signals[name]);
    expect(await wait(client, 'p')).toMatchObject({ exitStatus });
    await expect(start(client, 'p')).rejects.toMatchObject({ code: status.FAILED_PRECONDITION });
    await remove(client, 'p');
  });

  it('leaves signals to its program once that may run', async () => {
    await create(client, 'q', 'end() { exit 7; }; trap end TERM; echo up; while :; do sleep 0.01; done');
    await start(client, 'q');
    const output = new OutputReader(client, 'q');
    expect((await output.take(3)).toString()).toBe('up\n');
    await signal(client, 'q', constants.signals.SIGTERM);
    expect(await wait(client, 'q')).toMatchObject({ exitStatus: 7 });
    await remove(client, 'q');
  });

  it('can be killed and removed before it was started', async () => {
    await create(client, 'g', 'exit 0');
    await signal(client, 'g', 9);
    expect(await wait(client, 'g')).toMatchObject({ exitStatus: 137 });
    await expect(start(client, 'g')).rejects.toMatchObject({ details: 'cannot start container "g": it is stopped' });
    await remove(client, 'g');
    await create(client, 'g', 'exit 0');
    await remove(client, 'g');
    expect(agent.leftovers()).toEqual([]);
  });

  it('gives its output to readers that come after its end, until they have acknowledged it', async () => {
    await create(client, 'h', 'echo early');
    await start(client, 'h');
    expect(await wait(client, 'h')).toMatchObject({ stdoutBytes: 6n, stderrBytes: 0n });
    const hasty = new OutputReader(client, 'h');
    expect((await hasty.take(6)).toString()).toBe('early\n');
    expect((await read(client, 'h')).toString()).toBe('early\n');
    expect(await hasty.next()).toBeUndefined();
    expect((await read(client, 'h', 'stdout', 6)).length).toBe(0);
    await expect(read(client, 'h')).rejects.toMatchObject({
      code: status.OUT_OF_RANGE,
      details: 'stdout cannot be read from byte 0: 6 are delivered already',
    });
    await expect(read(client, 'h', 'stdout', 7)).rejects.toMatchObject({
      code: status.OUT_OF_RANGE,
      details: 'stdout has 6 bytes so far, so byte 7 cannot be delivered',
    });
    await remove(client, 'h');
  });

  it('gives both outputs in one call, each until it has ended and is acknowledged', async () => {
    await create(client, 'both', 'echo 12345; echo 123 >&2');
    const stdout = OutputStream.OUTPUT_STREAM_STDOUT;
    const call = client.readOutput();
    call.write({ id: 'both', execId: '', stream: stdout, delivered: 0n, stderrDelivered: 0n });
    const messages = call[Symbol.asyncIterator]() as AsyncIterator<ReadOutputResponse>;
    const next = async () => {
      const { value } = await messages.next();
      return { text: value.data.toString(), stderr: value.stderr, ended: value.ended };
    };
    const acknowledge = (delivered: bigint, stderrDelivered: bigint) =>
      call.write({ id: '', execId: '', stream: 0, delivered, stderrDelivered });
    await start(client, 'both');
    const written = [await next(), await next()].sort((one, other) => Number(one.stderr) - Number(other.stderr));
    expect(written).toEqual([
      { text: '12345\n', stderr: false, ended: false },
      { text: '123\n', stderr: true, ended: false },
    ]);
    await wait(client, 'both');
    acknowledge(0n, 4n);
    expect(await next()).toEqual({ text: '', stderr: true, ended: true });
    acknowledge(6n, 4n);
    expect((await messages.next()).done).toBe(true);
    await remove(client, 'both');
  });

  it('tells of both outputs that end together by the end of the call alone', async () => {
    await create(client, 'both', 'exit 0');
    const call = client.readOutput();
    call.write({
      id: 'both',
      execId: '',
      stream: OutputStream.OUTPUT_STREAM_STDOUT,
      delivered: 0n,
      stderrDelivered: 0n,
    });
    await start(client, 'both');
    const messages = call[Symbol.asyncIterator]() as AsyncIterator<ReadOutputResponse>;
    expect((await messages.next()).done).toBe(true);
    await wait(client, 'both');
    await remove(client, 'both');
  });

  it('refuses a call for both outputs when one of them cannot be read from there', async () => {
    await create(client, 'both', 'exit 0');
    const call = client.readOutput();
    const stdout = OutputStream.OUTPUT_STREAM_STDOUT;
    call.write({ id: 'both', execId: '', stream: stdout, delivered: 0n, stderrDelivered: 1n });
    const refused = new Promise((resolve) => call.once('error', resolve));
    call.resume();
    expect(await refused).toMatchObject({
      code: status.OUT_OF_RANGE,
      details: 'stderr has 0 bytes so far, so byte 1 cannot be delivered',
    });
    await remove(client, 'both');
  });

  it('lets another reader go on where the first has left, and the latest reader takes over', async () => {
    await create(client, 'm', 'echo first; read -r line; echo $line');
    await start(client, 'm');
    const first = new OutputReader(client, 'm');
    expect((await first.take(6)).toString()).toBe('first\n');
    const second = new OutputReader(client, 'm', 'stdout', 3);
    expect((await second.take(3)).toString()).toBe('st\n');
    expect(await first.next()).toBeUndefined();
    second.call.cancel();
    await list(client, 'm');
    const third = read(client, 'm', 'stdout', 6);
    await write(client, 'm', 'second\n');
    expect((await third).toString()).toBe('second\n');
    await wait(client, 'm');
    await remove(client, 'm');
  });

  it('that does not read its stdin makes no error of it', async () => {
    await create(client, 'i', 'exec <&-; sleep 0; exit 3');
    await start(client, 'i');
    await write(client, 'i', Buffer.alloc(1 << 20), Buffer.alloc(1 << 20));
    expect(await wait(client, 'i')).toMatchObject({ exitStatus: 3 });
    await remove(client, 'i');
  });

  it('can open /dev/stdout again, because it is a pipe', async () => {
    await create(client, 'j', 'echo again > /dev/stdout; echo more > /dev/stderr');
    await start(client, 'j');
    expect((await read(client, 'j')).toString()).toBe('again\n');
    expect((await read(client, 'j', 'stderr')).toString()).toBe('more\n');
    await remove(client, 'j');
  });

  it('writes 64 MiB that arrive byte for byte, while another is read slowly', async () => {
    await create(client, 'slow', 'yes slow');
    await start(client, 'slow');
    const stalled = new OutputReader(client, 'slow');
    await stalled.take(1);
    await create(
      client,
      'k',
      'i=0; while [ $i -lt 64 ]; do head -c 1048576 /dev/zero | tr x y; i=$((i+1)); done; echo end',
    );
    await start(client, 'k');
    const output = await read(client, 'k');
    expect(output.length).toBe((64 << 20) + 4);
    expect(output.subarray(64 << 20).toString()).toBe('end\n');
    expect(output.subarray(0, 64 << 20).every((byte) => byte === 0)).toBe(true);
    await remove(client, 'k');
    stalled.call.cancel();
    await remove(client, 'slow', true);
  }, 60_000);

  it('takes and gives much at the same time', async () => {
    await create(client, 'both', 'cat');
    await start(client, 'both');
    const given = Array.from({ length: 256 }, (_, n) => Buffer.alloc(64 * 1024, n));
    const writing = write(client, 'both', ...given);
    expect((await read(client, 'both')).equals(Buffer.concat(given))).toBe(true);
    await writing;
    await wait(client, 'both');
    await remove(client, 'both');
  });

  it('reads nothing where nothing comes for its stdin, and nobody writes to that', async () => {
    await create(client, 'none', 'cat; exit 3');
    await start(client, 'none', true);
    expect(await wait(client, 'none')).toMatchObject({ exitStatus: 3 });
    await expect(write(client, 'none', 'x')).rejects.toMatchObject({ details: 'stdin is closed' });
    await remove(client, 'none');
  });

  it('has one writer of its stdin at a time, the latest, whose end closes it', async () => {
    const gate = join(agent.directory, 'gate');
    await create(client, 'l', `echo up; while [ ! -e ${gate} ]; do sleep 0.01; done; cat; exit 9`);
    await start(client, 'l');
    const output = new OutputReader(client, 'l');
    expect((await output.take(3)).toString()).toBe('up\n');
    // More than its stdin's pipe holds, which nobody reads yet.
    const answer = Promise.withResolvers<unknown>();
    const call = client.writeStdin(answer.resolve);
    call.write({ id: 'l', execId: '', data: Buffer.alloc(100_000, 'a') });
    const held = answer.promise.then(() => 'answered');
    // Round trips on the same connection: the first writer has come.
    for (let turn = 0; turn < 3; turn += 1) await list(client, 'l');
    expect(await Promise.race([held, list(client, 'l').then(() => 'held back')])).toBe('held back');
    const second = write(client, 'l', ' after');
    expect(await answer.promise).toMatchObject({
      code: status.ABORTED,
      details: 'another writer of stdin took over',
    });
    writeFileSync(gate, '');
    await second;
    expect((await output.take(100_006)).toString()).toBe(`${'a'.repeat(100_000)} after`);
    expect(await wait(client, 'l')).toMatchObject({ exitStatus: 9, stdoutBytes: 100_009n });
    await expect(write(client, 'l', 'x')).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'stdin is closed',
    });
    await remove(client, 'l');
  });

  it('keeps its own exit status among many that end at once, orphans included', async () => {
    const ids = Array.from({ length: 8 }, (_, i) => `many-${i}`);
    await Promise.all(ids.map((id) => create(client, id, `(sleep 0 &) ; (exit 1 &) ; exit ${id.at(-1)}`)));
    await Promise.all(ids.map((id) => start(client, id)));
    const exits = await Promise.all(ids.map((id) => wait(client, id)));
    expect(exits.map((exit) => exit.exitStatus)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    await Promise.all(ids.map((id) => remove(client, id)));
    expect(agent.leftovers()).toEqual([]);
  }, 20_000);

  // Last, since it leaves something.
  it('that cannot be removed is there still, so that nobody takes its disks for free', async () => {
    await create(client, 'stuck', 'exit 0');
    await start(client, 'stuck');
    await wait(client, 'stuck');
    const stuck = join(agent.directory, 'crun', 'stuck', 'stuck');
    writeFileSync(stuck, '');
    const busy = { details: 'cannot delete container "stuck": Device or resource busy' };
    await expect(remove(client, 'stuck')).rejects.toMatchObject(busy);
    await expect(remove(client, 'stuck', true)).rejects.toMatchObject(busy);
  });
});

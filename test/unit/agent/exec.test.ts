import { status } from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { AgentClient } from '../../../gen/kiln/agent/v1/agent.ts';
import { hasGcc } from '../native/harness.ts';
import {
  compileFakeConsole,
  create,
  describeContainer,
  exec,
  hello,
  list,
  OutputReader,
  read,
  remove,
  removeProcess,
  signal,
  start,
  TestAgent,
  unary,
  wait,
  write,
} from './agent.ts';

let agent: TestAgent;
let client: AgentClient;
const id = 'c1';
const name = (execId: string) => ({ id, execId });

beforeAll(async () => {
  agent = new TestAgent();
  client = await agent.accept();
  await hello(client);
  await create(client, id, 'exec sleep 1000');
  await start(client, id);
});
afterAll(() => agent[Symbol.asyncDispose]());

describe("an exec'd process", () => {
  it('has its own stdio and its own exit, and is gone when it is removed', async () => {
    const pid = await exec(client, name('a'), 'cat; echo problem >&2; exit 7');
    expect(pid).toBeGreaterThan(1);
    const stdout = read(client, name('a'));
    await write(client, name('a'), 'one ', 'two');
    const exit = await wait(client, name('a'));
    expect(exit).toMatchObject({ exitStatus: 7, stdoutBytes: 7n, stderrBytes: 8n });
    expect((await stdout).toString()).toBe('one two');
    expect((await read(client, name('a'), 'stderr')).toString()).toBe('problem\n');
    await removeProcess(client, name('a'));
    await expect(wait(client, name('a'))).rejects.toMatchObject({
      code: status.NOT_FOUND,
      details: 'container "c1" has no process "a"',
    });
    expect(agent.leftovers().filter((file) => file.includes('exec-'))).toEqual([]);
  });

  it('reads nothing where nothing comes for its stdin, and nobody writes to that', async () => {
    await exec(client, name('none'), 'cat; echo end', {}, true);
    expect((await read(client, name('none'))).toString()).toBe('end\n');
    await expect(write(client, name('none'), 'x')).rejects.toMatchObject({ details: 'stdin is closed' });
    await removeProcess(client, name('none'));
  });

  it('is told of by the call that has made it, until it has ended', async () => {
    const process = Buffer.from(JSON.stringify({ args: ['exit'], script: 'exit 4' }));
    const stdio = { stdin: false, stdout: false, stderr: false, terminal: false, width: 0, height: 0 };
    const told = client.execProcess({ ...name('told'), process, stdio, stdinEnded: false })[Symbol.asyncIterator]();
    expect((await told.next()).value).toMatchObject({ pid: expect.any(Number), process: undefined });
    expect((await told.next()).value).toMatchObject({ pid: 0, process: { exitStatus: 4 } });
    expect((await told.next()).done).toBe(true);
    await removeProcess(client, name('told'));
  });

  it('has a name that no other has until it is removed, and then the name is free', async () => {
    await exec(client, name('b'), 'exec sleep 1000');
    const taken = { code: status.ALREADY_EXISTS, details: 'container "c1" has a process "b" already' };
    await expect(exec(client, name('b'), 'exit 0')).rejects.toMatchObject(taken);
    await signal(client, name('b'), 9);
    expect(await wait(client, name('b'))).toMatchObject({ exitStatus: 137 });
    await expect(exec(client, name('b'), 'exit 0')).rejects.toMatchObject(taken);
    await removeProcess(client, name('b'));
    await exec(client, name('b'), 'exit 3');
    expect(await wait(client, name('b'))).toMatchObject({ exitStatus: 3 });
    await removeProcess(client, name('b'));
  });

  it('has a name while it is being started, for one of two at once', async () => {
    const both = await Promise.allSettled([exec(client, name('twin'), 'exit 0'), exec(client, name('twin'), 'exit 0')]);
    expect(both.map((outcome) => outcome.status).sort()).toEqual(['fulfilled', 'rejected']);
    await wait(client, name('twin'));
    await removeProcess(client, name('twin'));
  });

  it('that runs is not removed', async () => {
    await exec(client, name('c'), 'exec sleep 1000');
    await expect(removeProcess(client, name('c'))).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'cannot remove process "c" of container "c1": it is running',
    });
    await signal(client, name('c'), 15);
    expect(await wait(client, name('c'))).toMatchObject({ exitStatus: 143 });
    await removeProcess(client, name('c'));
  });

  it('whose program does not exist is refused in the words of runc, and leaves nothing', async () => {
    await expect(exec(client, name('d'), 'nosuch')).rejects.toMatchObject({
      code: status.INVALID_ARGUMENT,
      details: 'exec: "nosuch": executable file not found in $PATH',
    });
    expect(await describeContainer(client, id)).toEqual({ started: true, paused: false, execs: [] });
    expect(agent.leftovers().filter((file) => file.includes('exec-'))).toEqual([]);
    await exec(client, name('d'), 'exit 0');
    await wait(client, name('d'));
    await removeProcess(client, name('d'));
  });

  it('is no mistake of the caller’s when crun is killed, and leaves nothing', async () => {
    await expect(exec(client, name('k'), 'killed')).rejects.toMatchObject({
      code: status.INTERNAL,
      details: 'crun exec ended with SIGKILL and no message',
    });
    expect(await describeContainer(client, id)).toEqual({ started: true, paused: false, execs: [] });
    expect(agent.leftovers().filter((file) => file.includes('exec-'))).toEqual([]);
  });

  it('has a name, and a container', async () => {
    await expect(exec(client, name(''), 'exit 0')).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
    await expect(exec(client, { id: 'ghost', execId: 'x' }, 'exit 0')).rejects.toMatchObject({
      code: status.NOT_FOUND,
      details: 'no container "ghost" in this guest',
    });
    const missing = { code: status.NOT_FOUND, details: 'container "c1" has no process "ghost"' };
    await expect(signal(client, name('ghost'), 9)).rejects.toMatchObject(missing);
    await expect(removeProcess(client, name('ghost'))).rejects.toMatchObject(missing);
    await expect(read(client, name('ghost'))).rejects.toMatchObject(missing);
    await expect(write(client, name('ghost'), 'x')).rejects.toMatchObject(missing);
    await expect(removeProcess(client, name(''))).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
  });

  it('gets signals of its own, none after its end, and its container gets none of them', async () => {
    await exec(client, name('e'), 'exec sleep 1000');
    await expect(signal(client, name('e'), 999)).rejects.toMatchObject({ code: status.INVALID_ARGUMENT });
    await signal(client, name('e'), 0);
    await signal(client, name('e'), 1);
    expect(await wait(client, name('e'))).toMatchObject({ exitStatus: 129 });
    await expect(signal(client, name('e'), 1)).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'process "e" of container "c1" has ended',
    });
    await signal(client, id, 0);
    await removeProcess(client, name('e'));
  });

  it('keeps its exit for whoever asks late, with the same answer each time', async () => {
    await exec(client, name('f'), 'echo out; exit 11');
    const [first, second] = [await wait(client, name('f')), await wait(client, name('f'))];
    expect(first).toEqual(second);
    expect(first).toMatchObject({ exitStatus: 11, stdoutBytes: 4n, stderrBytes: 0n });
    expect((await read(client, name('f'))).toString()).toBe('out\n');
    await removeProcess(client, name('f'));
  });

  it('ends when it ends, although a child of it holds its stdout open and writes on', async () => {
    await exec(client, name('g'), 'exec 3<&0; (read -r line <&3; echo late $line) & echo early; exit 5');
    expect(await wait(client, name('g'))).toMatchObject({ exitStatus: 5, stdoutBytes: 6n });
    const reader = new OutputReader(client, name('g'));
    expect((await reader.take(6)).toString()).toBe('early\n');
    await write(client, name('g'), 'child\n');
    expect((await reader.take(11)).toString()).toBe('late child\n');
    reader.acknowledge();
    expect(await reader.next()).toBeUndefined();
    await removeProcess(client, name('g'));
  });

  it('has only the streams that were asked for', async () => {
    await exec(client, name('h'), 'echo lost; echo seen >&2; exit 0', { stdin: false, stdout: false });
    await expect(read(client, name('h'))).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'process "h" of container "c1" was created without this output',
    });
    await expect(write(client, name('h'), 'x')).rejects.toMatchObject({
      details: 'process "h" of container "c1" was created without this stdin',
    });
    expect((await read(client, name('h'), 'stderr')).toString()).toBe('seen\n');
    const exit = await wait(client, name('h'));
    expect(exit.stdoutBytes).toBeUndefined();
    expect(exit.stderrBytes).toBe(5n);
    const resize = unary((done) => client.resizeTerminal({ ...name('h'), width: 80, height: 24 }, done));
    await expect(resize).rejects.toMatchObject({ code: status.FAILED_PRECONDITION, details: 'it has no terminal' });
    await removeProcess(client, name('h'));
  });

  it('is told apart from the init in the list of processes, and is not in it after its end', async () => {
    const pid = await exec(client, name('i'), 'exec sleep 1000');
    const init = (await list(client, id)).find((process) => process.init);
    expect(await list(client, id)).toContainEqual({ pid, execId: 'i', init: false });
    expect(init).toMatchObject({ execId: '' });
    expect(await describeContainer(client, id)).toEqual({
      started: true,
      paused: false,
      execs: [{ pid, execId: 'i', init: false }],
    });
    await signal(client, name('i'), 9);
    await wait(client, name('i'));
    expect(await list(client, id)).not.toContainEqual(expect.objectContaining({ execId: 'i' }));
    expect(await describeContainer(client, id)).toEqual({
      started: true,
      paused: false,
      execs: [{ pid, execId: 'i', init: false }],
    });
    await removeProcess(client, name('i'));
  });
});

describe('a container with other processes', () => {
  it('takes them before its start, and says that it was not started', async () => {
    await create(client, 'young', 'exec sleep 1000');
    const pid = await exec(client, { id: 'young', execId: 'x' }, 'exit 4');
    expect(await wait(client, { id: 'young', execId: 'x' })).toMatchObject({ exitStatus: 4 });
    expect(await describeContainer(client, 'young')).toEqual({
      started: false,
      paused: false,
      execs: [{ pid, execId: 'x', init: false }],
    });
    await remove(client, 'young', true);
  });

  it('takes none after its end, and takes what is left of them with it', async () => {
    await create(client, 'old', 'read -r line; exit 0');
    await start(client, 'old');
    await exec(client, { id: 'old', execId: 'x' }, 'echo unread; exit 4');
    await wait(client, { id: 'old', execId: 'x' });
    await write(client, 'old', 'go\n');
    await wait(client, 'old');
    await expect(exec(client, { id: 'old', execId: 'y' }, 'exit 0')).rejects.toMatchObject({
      code: status.FAILED_PRECONDITION,
      details: 'cannot run a process in container "old": it is stopped',
    });
    // The exit is still there, and so is the output.
    expect(await wait(client, { id: 'old', execId: 'x' })).toMatchObject({ exitStatus: 4 });
    expect((await read(client, { id: 'old', execId: 'x' })).toString()).toBe('unread\n');
    await remove(client, 'old');
    await expect(describeContainer(client, 'old')).rejects.toMatchObject({ code: status.NOT_FOUND });
  });
});

describe('after a broken connection', () => {
  it('output goes on at the byte that was delivered last, stdin is still open, and the exit is known', async () => {
    await exec(client, name('r'), 'echo 0123456789; cat; exit 6');
    const before = new OutputReader(client, name('r'));
    await before.take(11);
    before.acknowledge(4);
    const writing = new Promise((resolve) => {
      const call = client.writeStdin(resolve);
      call.on('error', () => {});
      call.write({ ...name('r'), data: Buffer.from('half ') });
    });
    expect((await before.take(5)).toString()).toBe('half ');
    const next = agent.accept();
    agent.disconnect();
    expect(await writing).toMatchObject({ code: status.UNAVAILABLE });
    client = await next;
    await hello(client);
    const after = new OutputReader(client, name('r'), 'stdout', 4);
    expect((await after.take(12)).toString()).toBe('456789\nhalf ');
    await write(client, name('r'), 'whole');
    expect((await after.take(5)).toString()).toBe('whole');
    after.acknowledge();
    expect(await after.next()).toBeUndefined();
    expect(await wait(client, name('r'))).toMatchObject({ exitStatus: 6, stdoutBytes: 21n });
    await removeProcess(client, name('r'));
  });

  it('the agent knows the session that it was told first, and no other replaces it', async () => {
    await using fresh = new TestAgent();
    let host = await fresh.accept();
    expect((await hello(host, { session: 'first' })).session).toBe('');
    expect((await hello(host, { session: 'second' })).session).toBe('first');
    const next = fresh.accept();
    fresh.disconnect();
    host = await next;
    expect((await hello(host, { session: 'third' })).session).toBe('first');
    expect((await hello(host)).session).toBe('first');
  });
});

describe.skipIf(!hasGcc)('a terminal', () => {
  const size = { width: 132, height: 43 };
  beforeAll(() => compileFakeConsole(agent.fakeConsole));

  it("is the process's stdin, stdout and stderr, of the size that was asked for, and its end is the end", async () => {
    await exec(client, name('t'), 'read -r line; stty size; tty -s && echo yes; echo err >&2; exit 5', {
      terminal: true,
      ...size,
    });
    // The program runs already when crun hands the terminal over, so its size is there a little later.
    await write(client, name('t'), 'go\n');
    expect((await read(client, name('t'))).toString()).toBe('go\r\n43 132\r\nyes\r\nerr\r\n');
    const exit = await wait(client, name('t'));
    expect(exit.exitStatus).toBe(5);
    expect(exit.stdoutBytes).toBeUndefined();
    expect(exit.stderrBytes).toBeUndefined();
    await expect(read(client, name('t'), 'stderr')).rejects.toMatchObject({ code: status.FAILED_PRECONDITION });
    await removeProcess(client, name('t'));
    expect(agent.leftovers().filter((file) => file.includes('console-'))).toEqual([]);
  });

  it('stays open where nothing comes for its stdin', async () => {
    await exec(client, name('open'), 'read -r line; exit 3', { terminal: true, ...size }, true);
    await write(client, name('open'), 'go\n');
    expect(await wait(client, name('open'))).toMatchObject({ exitStatus: 3 });
    await removeProcess(client, name('open'));
  });

  it("can have another size while it runs, and keeps its stdin when a writer's stream ends", async () => {
    await create(client, 'tty', 'stty -echo; stty size; read -r line; stty size; cat; exit 3', {
      stdio: { terminal: true, ...size },
    });
    await start(client, 'tty');
    const reader = new OutputReader(client, 'tty');
    expect((await reader.take(8)).toString()).toBe('43 132\r\n');
    await unary((done) => client.resizeTerminal({ id: 'tty', execId: '', width: 80, height: 24 }, done));
    await write(client, 'tty', 'go\n');
    expect((await reader.take(7)).toString()).toBe('24 80\r\n');
    await write(client, 'tty', 'more\n');
    expect((await reader.take(6)).toString()).toBe('more\r\n');
    // Ctrl-D.
    await write(client, 'tty', '\x04');
    reader.acknowledge();
    expect(await reader.next()).toBeUndefined();
    expect(await wait(client, 'tty')).toMatchObject({ exitStatus: 3 });
    await remove(client, 'tty');
  });

  it('that crun does not send is an error, and leaves nothing', async () => {
    const failing = exec(client, name('u'), 'nosuch', { terminal: true, ...size });
    await expect(failing).rejects.toMatchObject({ details: 'exec: "nosuch": executable file not found in $PATH' });
    expect(agent.leftovers().filter((file) => file.includes('console-'))).toEqual([]);
  });
});

it('a reader can leave in the middle of an output without harm', async () => {
  await exec(client, name('y'), 'yes');
  const reader = new OutputReader(client, name('y'));
  await reader.take(1);
  reader.call.cancel();
  await list(client, id);
  await signal(client, name('y'), 9);
  expect(await wait(client, name('y'))).toMatchObject({ exitStatus: 137 });
  await removeProcess(client, name('y'));
});

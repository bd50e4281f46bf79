import { existsSync, mkdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { useOciStage } from '../support/oci-stage.ts';
import { digest, Lines, run } from '../support/spawn.ts';
import { Terminal } from '../support/terminal.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

/** Tells of signals, and ends with SIGTERM. */
const waiting = 'trap "echo term; exit 9" TERM; trap "echo usr1" USR1; echo up; while :; do sleep 1000 & wait $!; done';

describe('kiln as an OCI runtime', () => {
  const stage = useOciStage();

  it('runs a bundle in the foreground: stdio, exit code, and what it writes is in the bundle', async () => {
    const script = 'cat; echo err >&2; echo written > /made; ls /proc/1/exe > /dev/null; exit 7';
    const { directory, rootfs } = await stage.bundle({ args: ['sh', '-c', script] });
    const id = stage.id();
    const result = await stage.run(['run', '--bundle', directory, id], { stdin: 'in\n' });
    expect(result).toEqual({ code: 7, stdout: Buffer.from('in\n'), stderr: 'err\n' });
    expect(readFileSync(join(rootfs, 'made'), 'utf8')).toBe('written\n');
    expect(await stage.run(['state', id])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('does not exist'),
    });
  });

  it('creates, starts, kills and deletes; the pid is a child of the subreaper and behaves as the container', async () => {
    const bundle = await stage.bundle({ args: ['sh', '-c', waiting], annotations: { colour: 'red' } });
    const id = stage.id();
    const { program, pid } = await stage.create(id, bundle);
    await using _program = program;
    const lines = new Lines(program.stdout);
    program.stderr.resume();
    const state = JSON.parse(await stage.must(['state', id]));
    expect(state).toMatchObject({ id, pid, status: 'created', bundle: bundle.directory, owner: 'root' });
    expect(state.annotations).toEqual({ colour: 'red' });
    expect(lines.all).toEqual([]);

    await stage.must(['start', id]);
    await lines.waitFor((line) => line === 'up', 'the program');
    expect((await stage.state(id)).status).toBe('running');
    expect(await stage.run(['start', id])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('cannot start an already running container'),
    });
    expect(await stage.run(['delete', id])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining(`cannot delete container ${id} that is not stopped: running`),
    });
    const again = await stage.run(['run', '--bundle', bundle.directory, id]);
    expect(again).toMatchObject({ code: 1, stderr: expect.stringContaining('container with given ID already exists') });

    // What a caller does with the pid.
    expect(readlinkSync(`/proc/${pid}/ns/net`)).not.toBe(readlinkSync('/proc/self/ns/net'));
    expect(readFileSync(`/proc/${pid}/root/etc/passwd`, 'utf8')).toContain('kate');
    expect(signal(pid, 'SIGUSR1')).toBe(true);
    await lines.waitFor((line) => line === 'usr1', 'the signal');

    const exec = await stage.run(['exec', id, 'sh', '-c', 'cat; echo err >&2; exit 4'], { stdin: 'through exec\n' });
    expect(exec).toEqual({ code: 4, stdout: Buffer.from('through exec\n'), stderr: 'err\n' });
    const missing = await stage.run(['exec', id, 'nothing-like-it']);
    expect(missing).toMatchObject({ code: 255, stderr: expect.stringContaining('executable file not found') });
    const user = await stage.run([
      'exec',
      '--user',
      '1234:5678',
      '--cwd',
      '/tmp',
      '--env',
      'A=b',
      id,
      'sh',
      '-c',
      'id -u; pwd; echo $A',
    ]);
    expect(user.stdout.toString()).toBe('1234\n/tmp\nb\n');
    const execPid = join(stage.dir, 'exec.pid');
    await stage.must(['exec', '--detach', '--pid-file', execPid, id, 'sh', '-c', 'echo detached > /tmp/d']);
    await waitForEnd(Number(readFileSync(execPid, 'utf8')), 20_000);
    expect(readFileSync(join(bundle.rootfs, 'tmp/d'), 'utf8')).toBe('detached\n');

    await stage.must(['pause', id]);
    expect((await stage.state(id)).status).toBe('paused');
    expect(await stage.run(['exec', id, 'true'])).toMatchObject({
      code: 255,
      stderr: expect.stringContaining('paused'),
    });
    await stage.must(['resume', id]);
    expect(JSON.parse(await stage.must(['ps', '--format', 'json', id]))).toContain(pid);
    expect(await stage.must(['list', '-q'])).toBe(`${id}\n`);

    await stage.must(['kill', id, 'TERM']);
    expect(await program.exit).toBe(9);
    expect(lines.all.at(-1)).toBe('term');
    expect(await stage.state(id)).toMatchObject({ status: 'stopped', pid: 0 });
    const dead = await stage.run(['kill', id, '9']);
    expect(dead).toMatchObject({ code: 1, stderr: expect.stringContaining('container not running') });
    await stage.must(['delete', id]);
    expect(await stage.run(['delete', id])).toMatchObject({ code: 1 });
    expect(await stage.run(['delete', '--force', id])).toMatchObject({ code: 0 });
  });

  it('keeps what came on stdin before the start, and every byte both ways', async () => {
    const bundle = await stage.bundle({
      args: ['sh', '-c', 'sha256sum; head -c 3000000 /bin/busybox | head -c 1500000'],
    });
    const id = stage.id();
    const { program } = await stage.create(id, bundle, { interactive: true });
    await using _program = program;
    program.stderr.resume();
    const output = digest(program.stdout);
    program.stdin.end('early\n');
    await stage.must(['start', id]);
    expect(await program.exit).toBe(0);
    const busybox = readFileSync(join(bundle.rootfs, 'bin/busybox')).subarray(0, 1_500_000);
    const { createHash } = await import('node:crypto');
    const first = `${createHash('sha256').update('early\n').digest('hex')}  -\n`;
    const wanted = createHash('sha256').update(first).update(busybox).digest('hex');
    expect(await output).toEqual({ sha256: wanted, length: first.length + busybox.length });
    await stage.must(['delete', id]);
  });

  it('gives a program the caller’s own terminal, with its size', async () => {
    const { directory } = await stage.bundle({ args: ['sh'], terminal: true });
    const id = stage.id();
    await using terminal = new Terminal([stage.kiln, 'run', '--bundle', directory, id], {
      columns: 71,
      env: stage.env,
      directory: stage.dir,
    });
    await terminal.waitFor(/#$/m);
    await terminal.type('stty size; tty\r');
    await terminal.waitFor(/24 71\n\/dev\/pts\/0/);
    await terminal.resize(93, 31);
    await terminal.type('stty size\r');
    await terminal.waitFor(/31 93/);
    await terminal.type('exit 0\r');
    await terminal.ended;
  });

  it('ends the container with the process that stands for it, and lives on without kilnd', async () => {
    const bundle = await stage.bundle({ args: ['sh', '-c', `${waiting}`] });
    const id = stage.id();
    const { program, pid } = await stage.create(id, bundle);
    await using _program = program;
    const lines = new Lines(program.stdout);
    program.stderr.resume();
    await stage.must(['start', id]);
    await lines.waitFor((line) => line === 'up', 'the program');
    const { kilndPid } = stage;
    signal(kilndPid, 'SIGKILL');
    await waitForEnd(kilndPid, 10_000);
    expect(signal(pid, 'SIGUSR1')).toBe(true);
    await lines.waitFor((line) => line === 'usr1', 'the signal, by the next kilnd');
    expect((await stage.state(id)).status).toBe('running');
    signal(pid, 'SIGKILL');
    expect(await program.exit).toBe(137);
    await expect.poll(async () => (await stage.state(id)).status, { timeout: 20_000 }).toBe('stopped');
    await stage.must(['delete', id]);
  });

  it('has stopped when its process has ended, also before who waits for that takes notice', async () => {
    const bundle = await stage.bundle({ args: ['true'] });
    const id = stage.id();
    const { program, pid } = await stage.create(id, bundle);
    await using _program = program;
    program.stdout.resume();
    program.stderr.resume();
    signal(program.pid, 'SIGSTOP');
    await stage.must(['start', id]);
    await waitForEnd(pid, 60_000);
    // The relay goes with it, so that only the process is left to tell.
    const { address } = JSON.parse(readFileSync(join(stage.root, id, 'state.json'), 'utf8'));
    await expect.poll(() => existsSync(address), { timeout: 20_000 }).toBe(false);
    expect(await stage.state(id)).toMatchObject({ status: 'stopped', pid: 0 });
    await stage.must(['delete', id]);
    signal(program.pid, 'SIGCONT');
    expect(await program.exit).toBe(0);
  });

  describe('bad cases', () => {
    it('refuses what is no container, and leaves nothing behind', async () => {
      const { directory } = await stage.bundle({ args: ['true'] });
      const create = (id: string, ...more: string[]) => stage.run(['create', '--bundle', directory, ...more, id]);
      const wrong = { code: 1, stdout: Buffer.alloc(0) };
      expect(await create('a/b')).toMatchObject({ ...wrong, stderr: expect.stringContaining('invalid container ID') });
      expect(await create('x'.repeat(300))).toMatchObject({ ...wrong, stderr: expect.stringContaining('invalid') });
      const socket = join(stage.dir, 'console.sock');
      expect(await create('a', '--console-socket', socket)).toMatchObject({
        ...wrong,
        stderr: expect.stringContaining('cannot use console socket'),
      });
      const nowhere = await stage.run(['run', '--bundle', '/nowhere', 'a']);
      expect(nowhere).toMatchObject({
        ...wrong,
        stderr: expect.stringContaining('/nowhere/config.json: no such file'),
      });
      const descriptors = await create('a', '--preserve-fds', '2');
      expect(descriptors).toMatchObject({ ...wrong, stderr: expect.stringContaining('--preserve-fds') });
      const windows = await stage.bundle({ args: ['true'], over: { windows: { layerFolders: ['a'] } } });
      const foreign = await stage.run(['run', '--bundle', windows.directory, 'a']);
      expect(foreign).toMatchObject({ ...wrong, stderr: expect.stringContaining('windows') });
      expect(await stage.must(['list', '-q'])).toBe('');
    });

    it('tells of errors in the log that callers read', async () => {
      const log = join(stage.dir, 'log.json');
      await stage.run(['--log', log, '--log-format', 'json', 'start', 'nobody']);
      const [line] = readFileSync(log, 'utf8')
        .trim()
        .split('\n')
        .map((text) => JSON.parse(text));
      expect(line).toEqual({
        level: 'error',
        msg: 'container does not exist',
        time: expect.stringMatching(/^\d{4}-.*Z$/),
      });
    });

    it('fails for a console socket that nobody accepts on, and one that is not there', async () => {
      const { directory } = await stage.bundle({ args: ['true'], terminal: true });
      const socket = join(stage.dir, 'dead.sock');
      const server = createServer().listen(socket);
      await new Promise((done) => server.once('listening', done));
      await new Promise((done) => server.close(done));
      writeFileSync(socket, '');
      for (const path of [socket, join(stage.dir, 'missing.sock')]) {
        const result = await stage.run(['create', '--bundle', directory, '--console-socket', path, 'a']);
        expect(result).toMatchObject({ code: 1, stderr: expect.stringContaining(`console socket ${path}`) });
      }
      expect(await stage.must(['list', '-q'])).toBe('');
    });

    it('gives the id to the next when the caller died in the middle of create', async () => {
      const { directory } = await stage.bundle({ args: ['true'] });
      const first = stage.stream(['create', '--bundle', directory, 'dead']);
      first.stdout.resume();
      first.stderr.resume();
      await expect
        .poll(() => existsSync(join(stage.root, 'dead', 'stdout')), { timeout: 20_000, interval: 5 })
        .toBe(true);
      first.kill('SIGKILL');
      await first.exit;
      await first[Symbol.asyncDispose]();
      expect(await stage.run(['run', '--bundle', directory, 'dead'])).toMatchObject({ code: 0, stderr: '' });
    });

    it('removes a container whose state is rubbish, by force only', async () => {
      mkdirSync(join(stage.root, 'rubbish'), { recursive: true });
      writeFileSync(join(stage.root, 'rubbish', 'state.json'), '{');
      const deleted = await stage.run(['delete', 'rubbish']);
      expect(deleted).toMatchObject({ code: 1, stderr: expect.stringContaining('delete --force rubbish') });
      await stage.must(['delete', '--force', 'rubbish']);
      expect(existsSync(join(stage.root, 'rubbish'))).toBe(false);
    });

    it('gives an id to one of many that want it at once', async () => {
      const { directory } = await stage.bundle({ args: ['true'] });
      // One of them leaves a process behind that keeps its stdio open.
      const script = 'exec "$0" --log "$1" create --bundle "$2" wanted >/dev/null 2>&1';
      const logs = Array.from({ length: 20 }, (_, index) => join(stage.dir, `wanted-${index}.log`));
      const codes = await Promise.all(
        logs.map(async (log) => {
          const { code } = await run('sh', ['-c', script, stage.kiln, log, directory], { env: stage.env });
          if (code !== 0) expect(readFileSync(log, 'utf8')).toContain('already exists');
          return code;
        }),
      );
      expect(codes.filter((code) => code === 0)).toHaveLength(1);
      await stage.must(['delete', 'wanted']);
      rmSync(directory, { recursive: true });
    });
  });
});

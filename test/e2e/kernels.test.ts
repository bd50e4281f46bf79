import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { projectRoot, underKiln } from '../support/paths.ts';
import { mustRun } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

/** A first build of the minimal kernel takes some ten minutes on two cores; a later one, half a second. */
const kernelBuildMs = 40 * 60_000;

// What a container needs of its kernel, read from inside: one line each, so that a failure names what is missing.
const probe = [
  'echo kernel $(uname -r)',
  'echo pid $$',
  'echo host $(hostname)',
  'echo loopback $(ping -c 1 127.0.0.1 >/dev/null && echo up)',
  'echo memory $(cat /sys/fs/cgroup/memory.max)',
  'echo pids $(cat /sys/fs/cgroup/pids.max)',
  'echo cpu $(cat /sys/fs/cgroup/cpu.max)',
  'echo seccomp $(grep -c "^Seccomp:.2" /proc/self/status)',
  'echo shm $(echo x >/dev/shm/x && cat /dev/shm/x)',
  'echo mqueue $(grep -c " /dev/mqueue mqueue " /proc/mounts)',
  'echo root $(grep -c "^overlay / overlay rw" /proc/mounts)',
  'echo written $(echo y >/etc/y && ln /etc/y /etc/z && sync && cat /etc/z)',
  'echo random $(head -c 8 /dev/urandom | wc -c)',
  'exit 3',
].join('\n');

describe.runIf(underKiln).each(['default', 'minimal'])('a container on the %s kernel', (kernel) => {
  beforeAll(async () => {
    if (kernel === 'minimal') await mustRun(join(projectRoot, 'scripts/guest-kernel'), [], { timeout: kernelBuildMs });
  }, kernelBuildMs);
  const scene = useScene({ version: '2.1', config: `[vm]\nkernel = "${kernel}"\n` });

  it('finds what it needs of a kernel', async () => {
    const id = scene.id();
    const flags = ['--rm', '--seccomp', '--memory-limit', '67108864', '--cpus', '0.5', '--hostname', 'kt'];
    const mounts = ['--mount', 'type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro'];
    const { code, stdout, stderr } = await scene.run(id, ['sh', '-c', probe], { flags: [...flags, ...mounts] });
    const found = Object.fromEntries(
      stdout
        .toString()
        .trim()
        .split('\n')
        .map((line) => line.split(/ (.*)/)),
    );
    expect({ code, stderr }).toEqual({ code: 3, stderr: '' });
    expect(found).toEqual({
      kernel: expect.stringMatching(kernel === 'minimal' ? /^6\.\d+\.\d+$|kiln/ : /-amd64$/),
      pid: '1',
      host: 'kt',
      loopback: 'up',
      memory: '67108864',
      pids: 'max',
      cpu: '50000 100000',
      seccomp: '1',
      shm: 'x',
      mqueue: '1',
      root: '1',
      written: 'y',
      random: '8',
    });
  });

  it('relays a stream of bytes both ways', async () => {
    const bytes = Buffer.alloc(4 * 2 ** 20, 'kiln');
    const { code, stdout } = await scene.run(scene.id(), ['cat'], { stdin: bytes });
    expect(code).toBe(0);
    expect(stdout.equals(bytes)).toBe(true);
  });

  it('that panics ends the container with 255', async () => {
    const { code } = await scene.runWithSpec(
      scene.id(),
      ['sh', '-c', 'echo c >/proc/sysrq-trigger; sleep 60'],
      (spec) => {
        spec.linux.readonlyPaths = [];
        return undefined;
      },
    );
    expect(code).toBe(255);
  });
});

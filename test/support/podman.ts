/** Debian's podman with a storage of its own, on the Kiln of an OCI stage. Its containers have no network but lo. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { OciStage } from './oci-stage.ts';
import { podmanTree } from './paths.ts';
import { mustRun, type RunOptions, type RunResult, run } from './spawn.ts';
import { Terminal } from './terminal.ts';

export class Podman {
  readonly image = 'localhost/busybox:test';
  readonly #stage: OciStage;
  readonly #dir: string;
  readonly #env: NodeJS.ProcessEnv;

  constructor(stage: OciStage) {
    this.#stage = stage;
    this.#dir = join(stage.dir, 'podman');
    const tree = podmanTree();
    this.#env = {
      PATH: `${join(tree, 'usr/bin')}:${process.env.PATH}`,
      LD_LIBRARY_PATH: join(tree, 'usr/lib/x86_64-linux-gnu'),
      HOME: this.#dir,
      CONTAINERS_CONF: join(this.#dir, 'containers.conf'),
      CONTAINERS_STORAGE_CONF: join(this.#dir, 'storage.conf'),
      CONTAINERS_REGISTRIES_CONF: join(this.#dir, 'registries.conf'),
    };
  }

  /** Writes its configuration, and makes the image. */
  async setUp(): Promise<void> {
    const tree = podmanTree();
    const policies = join(this.#dir, '.config', 'containers');
    mkdirSync(policies, { recursive: true });
    writeFileSync(join(policies, 'policy.json'), '{"default":[{"type":"insecureAcceptAnything"}]}');
    for (const name of ['root', 'run', 'tmp', 'volumes']) mkdirSync(join(this.#dir, name));
    // conmon passes on nothing of its environment, by which Kiln would know whose it is.
    const wrapper = join(this.#dir, 'kiln');
    const variables = Object.entries(this.#stage.env).map(([name, value]) => `export ${name}='${value}'\n`);
    writeFileSync(wrapper, `#!/bin/sh\n${variables.join('')}exec ${this.#stage.kiln} "$@"\n`, { mode: 0o755 });
    // For the podman that conmon calls at a container's end: else it does not find its libraries, and the end is not recorded.
    const names = ['PATH', 'LD_LIBRARY_PATH', 'HOME', 'CONTAINERS_CONF', 'CONTAINERS_STORAGE_CONF'];
    const forConmon = names.map((name) => JSON.stringify(`${name}=${this.#env[name]}`));
    writeFileSync(
      join(this.#dir, 'containers.conf'),
      `[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "kiln"
cgroup_manager = "cgroupfs"
events_logger = "file"
network_backend = "netavark"
conmon_env_vars = [${forConmon.join(', ')}]
conmon_path = ["${join(tree, 'usr/bin/conmon')}"]
helper_binaries_dir = ["${join(tree, 'usr/lib/podman')}", "${join(tree, 'usr/libexec/podman')}", "${join(tree, 'usr/bin')}"]
tmp_dir = "${join(this.#dir, 'tmp')}"
volume_path = "${join(this.#dir, 'volumes')}"
[engine.runtimes]
kiln = ["${wrapper}"]
[network]
network_config_dir = "${join(this.#dir, 'networks')}"
`,
    );
    writeFileSync(
      join(this.#dir, 'storage.conf'),
      `[storage]
driver = "overlay"
graphroot = "${join(this.#dir, 'root')}"
runroot = "${join(this.#dir, 'run')}"
`,
    );
    writeFileSync(join(this.#dir, 'registries.conf'), '');
    const { rootfs } = await this.#stage.bundle({ args: ['true'] });
    const layer = join(this.#dir, 'layer.tar');
    await mustRun('tar', ['-c', '-f', layer, '-C', rootfs, '.']);
    await this.must(['import', '--change', 'ENV PATH=/bin', layer, this.image]);
  }

  /** Removes every container and pod; the storage's own mounts go with them. */
  async tearDown(): Promise<void> {
    await this.run(['pod', 'rm', '--all', '--force', '--time', '0']);
    await this.run(['rm', '--all', '--force', '--time', '0']);
    // The overlay driver has its home mounted on itself.
    await run('umount', ['--recursive', join(this.#dir, 'root', 'overlay')]);
  }

  /** `podman run` with these arguments on a terminal. */
  terminal(args: readonly string[]): Terminal {
    const command = ['podman', 'run', '--interactive', '--tty', ...args];
    return new Terminal(command, { columns: 71, directory: this.#stage.dir, env: this.#env });
  }

  run(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
    return run('podman', args, { env: this.#env, ...options });
  }

  /** The same, which must succeed; its stdout without the last line's end. */
  async must(args: readonly string[], options: RunOptions = {}): Promise<string> {
    const result = await mustRun('podman', args, { env: this.#env, ...options });
    return result.stdout.toString().trimEnd();
  }
}

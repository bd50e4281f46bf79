/**
 * The containers of this guest: which there are, and how they come and go.
 */
import type { CreateContainerRequest, Mount } from '../gen/kiln/agent/v1/agent.ts';
import { Container } from './container.ts';
import { type ContainerOptions, createContainer } from './create.ts';
import { AgentError } from './errors.ts';

/** An id becomes a directory's name: what runc and crun allow, too. */
const validId = /^[\w+.-]{1,255}$/;

export class Containers {
  readonly #options: ContainerOptions;
  readonly #containers = new Map<string, Container>();
  /** Whoever has files for a container that is not yet there, by its id. */
  readonly #mounted = new Map<string, PromiseWithResolvers<readonly Mount[]>>();

  constructor(options: ContainerOptions) {
    this.#options = options;
  }

  /**
   * Everything short of the user's program. When it fails, nothing of the container is left.
   *
   * @returns the process id of its init
   */
  async create(request: CreateContainerRequest): Promise<number> {
    const { id } = request;
    if (!validId.test(id) || id === '.' || id === '..') {
      throw new AgentError('invalid-argument', `"${id}" is no container id: use letters, digits and _ + - .`);
    }
    if (this.#containers.has(id)) throw new AgentError('already-exists', `container "${id}" exists already`);
    const container = new Container(id, this.#options, () => this.#containers.delete(id));
    this.#containers.set(id, container);
    try {
      return await createContainer(container, request, {
        ...this.#options,
        mounted: (mounts) => this.#mounted.get(id)?.resolve(mounts),
        initOf: (other) => this.get(other).initToJoin(),
      });
    } catch (error) {
      this.#mounted.get(id)?.reject(error);
      // The clean-up has failed, too.
      if (error instanceof SuppressedError) container.refuseRemoval(error);
      else this.#containers.delete(id);
      throw error;
    }
  }

  /**
   * Puts files into the root filesystem of a container that is being made, and that awaits them; before its creation is
   * asked for, this waits for it. Or of one whose processes rest.
   */
  async provideFiles(id: string, write: (root: string) => Promise<void>): Promise<void> {
    const known = this.#containers.get(id);
    if (known?.parts !== undefined) return write(known.mountsAtRest().at(-1)?.target ?? '');
    const mounted = Promise.withResolvers<readonly Mount[]>();
    mounted.promise.catch(() => {});
    this.#mounted.set(id, mounted);
    try {
      const mounts = known?.mounts ?? (await mounted.promise);
      const { files } = this.get(id);
      try {
        await write(mounts.at(-1)?.target ?? '');
        files.resolve();
      } catch (error) {
        files.reject(error);
        throw error;
      }
    } finally {
      this.#mounted.delete(id);
    }
  }

  /** The ids of those that are not removed. */
  list(): string[] {
    return [...this.#containers.keys()];
  }

  /** @throws AgentError not-found */
  get(id: string): Container {
    const container = this.find(id);
    if (container === undefined) throw new AgentError('not-found', `no container "${id}" in this guest`);
    return container;
  }

  /** Undefined for one that is not there, or not any more. */
  find(id: string): Container | undefined {
    return this.#containers.get(id);
  }
}
